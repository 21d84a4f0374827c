//! Addresses in the document: listeners, networks, nodes.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, de};

use super::words::parsed;

/// Address and port of a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Bind(pub SocketAddr);

impl Bind {
    /// 127.0.0.1 and `port`.
    pub(crate) const fn loopback(port: u16) -> Self {
        Self(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port))
    }
}

impl Default for Bind {
    fn default() -> Self {
        Self::loopback(8080)
    }
}

impl fmt::Display for Bind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Bind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse().map(Self).map_err(|_| {
            format!("{text:?} is not an IP address and port; write them like 127.0.0.1:8080, 0.0.0.0:8080 or [::]:8080")
        })
    }
}

parsed!(Bind, "an IP address and port, like 127.0.0.1:8080", {
    "type": "string", "description": "An IP address and port, like 0.0.0.0:8080 or [::]:8080"
});

/// A network, like `10.0.0.0/8`; an address alone is a network of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Cidr {
    addr: IpAddr,
    bits: u8,
}

impl Cidr {
    /// Whether `addr` is of this network. An IPv4 address inside IPv6 (`::ffff:a.b.c.d`) counts as IPv4.
    pub(crate) fn contains(&self, addr: IpAddr) -> bool {
        let shift = |width: u8| u32::from(width.saturating_sub(self.bits));
        match (self.addr, addr.to_canonical()) {
            (IpAddr::V4(net), IpAddr::V4(addr)) => {
                (net.to_bits() ^ addr.to_bits()).checked_shr(shift(32)).unwrap_or(0) == 0
            }
            (IpAddr::V6(net), IpAddr::V6(addr)) => {
                (net.to_bits() ^ addr.to_bits()).checked_shr(shift(128)).unwrap_or(0) == 0
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
        }
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.addr, self.bits)
    }
}

impl FromStr for Cidr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad =
            || format!("{text:?} is not a network; write an address and the length of its prefix, like 10.0.0.0/8");
        let (addr, bits) = match text.split_once('/') {
            Some((addr, bits)) => (addr, Some(bits)),
            None => (text, None),
        };
        let addr: IpAddr = addr.parse().map_err(|_| bad())?;
        let width = if addr.is_ipv4() { 32 } else { 128 };
        let bits: u8 = bits.map_or(Ok(width), |bits| bits.parse().map_err(|_| bad()))?;
        if bits > width {
            return Err(bad());
        }
        Ok(Self { addr, bits })
    }
}

parsed!(Cidr, "a network, like 10.0.0.0/8", {
    "type": "string", "description": "A network, like 10.0.0.0/8, or one address"
});

/// Host name and port.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct HostPort {
    /// Host name or IP address.
    pub host: String,
    /// Port, never 0.
    pub port: u16,
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// Splits `host`, `host:port`, `[v6]` or `[v6]:port`; nothing else passes.
fn host_port(text: &str) -> Option<(String, Option<u16>)> {
    let (host, port) = if let Some(rest) = text.strip_prefix('[') {
        let (host, rest) = rest.split_once(']')?;
        host.parse::<std::net::Ipv6Addr>().ok()?;
        let port = if rest.is_empty() { None } else { Some(rest.strip_prefix(':')?) };
        (host, port)
    } else {
        let (host, port) = match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        };
        let sane = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        if host.is_empty() || !host.chars().all(sane) {
            return None;
        }
        (host, port)
    };
    let port = match port {
        Some(port) => Some(port.parse::<u16>().ok().filter(|port| *port != 0)?),
        None => None,
    };
    Some((host.to_owned(), port))
}

impl FromStr for HostPort {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match host_port(text) {
            Some((host, Some(port))) => Ok(Self { host, port }),
            _ => Err(format!("{text:?} is not a host name and port; write them like qwen.internal:8000")),
        }
    }
}

parsed!(HostPort, "a host name and port, like qwen.internal:8000", {
    "type": "string", "description": "Host name and port, like qwen.internal:8000"
});

/// Address of a node: scheme, host, port and path prefix.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct NodeUrl {
    /// Whether it is https.
    pub tls: bool,
    /// Host name or IP address, the latter without brackets.
    pub host: String,
    /// Port; 80 or 443 where none is written.
    pub port: u16,
    /// What is put before every path, without a slash at its end; mostly empty.
    pub prefix: String,
}

impl fmt::Display for NodeUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        let host = HostPort { host: self.host.clone(), port: self.port };
        write!(f, "{scheme}://{host}{}", self.prefix)
    }
}

impl FromStr for NodeUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad =
            |why: &str| format!("{text:?} is not the address of a node: {why}; write it like http://10.0.0.1:8000");
        if text.contains('@') {
            // The text is not repeated: it holds a password.
            return Err("the address of a node has no user name or password; use `credentials`".to_owned());
        }
        let (tls, rest) = if let Some(rest) = text.strip_prefix("http://") {
            (false, rest)
        } else if let Some(rest) = text.strip_prefix("https://") {
            (true, rest)
        } else {
            return Err(bad("it starts with neither http:// nor https://"));
        };
        if rest.contains(['?', '#']) {
            return Err(bad("a node has no query or fragment"));
        }
        let (authority, path) = rest.find('/').map_or((rest, ""), |slash| rest.split_at(slash));
        let (host, port) = host_port(authority).ok_or_else(|| bad("its host or port is not valid"))?;
        let prefix = path.trim_end_matches('/');
        if prefix.contains("//") || prefix.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return Err(bad("its path is not valid"));
        }
        Ok(Self { tls, host, port: port.unwrap_or(if tls { 443 } else { 80 }), prefix: prefix.to_owned() })
    }
}

parsed!(NodeUrl, "the address of a node, like http://10.0.0.1:8000", {
    "type": "string", "pattern": "^https?://", "description": "Address of a node, like http://10.0.0.1:8000 or https://api.example.org/prefix"
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_contains_its_addresses_and_no_others() {
        let contains = |net: &str, addr: &str| net.parse::<Cidr>().unwrap().contains(addr.parse().unwrap());
        assert!(contains("10.0.0.0/8", "10.255.0.1"));
        assert!(!contains("10.0.0.0/8", "11.0.0.1"));
        assert!(contains("10.0.0.0/8", "::ffff:10.0.0.1"));
        assert!(contains("0.0.0.0/0", "192.0.2.1"));
        assert!(contains("::/0", "2001:db8::1"));
        assert!(contains("2001:db8::/32", "2001:db8:1::1"));
        assert!(!contains("2001:db8::/32", "2001:db9::1"));
        assert!(contains("127.0.0.1", "127.0.0.1"));
        assert!(!contains("127.0.0.1", "127.0.0.2"));
        assert!("10.0.0.0/33".parse::<Cidr>().is_err());
        assert!("10.0.0/8".parse::<Cidr>().is_err());
    }

    #[test]
    fn the_address_of_a_node_has_scheme_host_port_and_prefix() {
        let url: NodeUrl = "https://api.example.org/openai/".parse().unwrap();
        assert_eq!(
            (url.tls, url.host.as_str(), url.port, url.prefix.as_str()),
            (true, "api.example.org", 443, "/openai")
        );
        let url: NodeUrl = "http://[::1]:8000".parse().unwrap();
        assert_eq!((url.tls, url.host.as_str(), url.port, url.prefix.as_str()), (false, "::1", 8000, ""));
        assert_eq!(url.to_string(), "http://[::1]:8000");
        for bad in [
            "10.0.0.1:8000",
            "ftp://a",
            "http://",
            "http://a:0",
            "http://a:70000",
            "http://a b",
            "http://a/?q",
            "http://::1",
        ] {
            assert!(bad.parse::<NodeUrl>().is_err(), "{bad}");
        }
        let error = "ftp://user:secret@a".parse::<NodeUrl>().unwrap_err();
        assert!(!error.contains("secret"), "{error}");
    }
}
