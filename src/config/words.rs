//! Small words of the document: switches, lists, addresses, moments.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, de};

/// Settings, or `off` (also written `false`). Absent settings are the defaults.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Toggle<T> {
    /// Turned off.
    Off,
    /// Turned on with these settings.
    On(T),
}

impl<T> Toggle<T> {
    /// The settings, if it is on.
    pub(crate) const fn on(&self) -> Option<&T> {
        match self {
            Self::On(settings) => Some(settings),
            Self::Off => None,
        }
    }
}

impl<T: Default> Default for Toggle<T> {
    fn default() -> Self {
        Self::On(T::default())
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Toggle<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> de::Visitor<'de> for Visitor<T> {
            type Value = Toggle<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("settings in { } or off")
            }

            fn visit_str<E: de::Error>(self, word: &str) -> Result<Self::Value, E> {
                if word == "off" { Ok(Toggle::Off) } else { Err(E::invalid_value(de::Unexpected::Str(word), &self)) }
            }

            fn visit_bool<E: de::Error>(self, on: bool) -> Result<Self::Value, E> {
                if on { Err(E::invalid_type(de::Unexpected::Bool(on), &self)) } else { Ok(Toggle::Off) }
            }

            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                T::deserialize(de::value::MapAccessDeserializer::new(map)).map(Toggle::On)
            }
        }
        deserializer.deserialize_any(Visitor(PhantomData))
    }
}

impl<T: JsonSchema> JsonSchema for Toggle<T> {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        format!("Toggle_{}", T::schema_name()).into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let settings = generator.subschema_for::<T>();
        json_schema!({ "anyOf": [settings, { "enum": ["off", false] }] })
    }
}

/// One word or a list of words.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Many(pub Vec<String>);

impl std::ops::Deref for Many {
    type Target = [String];

    fn deref(&self) -> &[String] {
        &self.0
    }
}

struct ManyVisitor;
impl<'de> de::Visitor<'de> for ManyVisitor {
    type Value = Many;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text or a list of texts")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Many, E> {
        Ok(Many(vec![text.to_owned()]))
    }

    fn visit_seq<A: de::SeqAccess<'de>>(self, list: A) -> Result<Many, A::Error> {
        Deserialize::deserialize(de::value::SeqAccessDeserializer::new(list)).map(Many)
    }
}

impl<'de> Deserialize<'de> for Many {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ManyVisitor)
    }
}

impl JsonSchema for Many {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Many".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "anyOf": [{ "type": "string" }, { "type": "array", "items": { "type": "string" }, "minItems": 1 }] })
    }
}

/// All names (`"*"`), or just these.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum Allowed {
    /// All of them.
    #[default]
    Any,
    /// Only these.
    These(Vec<String>),
}

impl Allowed {
    /// Whether `name` is among them.
    pub(crate) fn allows(&self, name: &str) -> bool {
        match self {
            Self::Any => true,
            Self::These(names) => names.iter().any(|one| one == name),
        }
    }
}

impl<'de> Deserialize<'de> for Allowed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Many(names) = deserializer.deserialize_any(ManyVisitor)?;
        Ok(if names.iter().any(|name| name == "*") { Self::Any } else { Self::These(names) })
    }
}

impl JsonSchema for Allowed {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Allowed".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        Many::json_schema(generator)
    }
}

/// Worker threads of the process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Threads {
    /// One per CPU.
    #[default]
    Auto,
    /// So many.
    Count(usize),
}

impl<'de> Deserialize<'de> for Threads {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Threads;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("auto or a number of threads")
            }

            fn visit_str<E: de::Error>(self, word: &str) -> Result<Threads, E> {
                if word == "auto" { Ok(Threads::Auto) } else { Err(E::invalid_value(de::Unexpected::Str(word), &self)) }
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Threads, E> {
                match usize::try_from(number) {
                    Ok(count @ 1..=1024) => Ok(Threads::Count(count)),
                    _ => Err(E::custom(format!("{number} threads; the number is from 1 to 1024"))),
                }
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl JsonSchema for Threads {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Threads".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "anyOf": [{ "const": "auto" }, { "type": "integer", "minimum": 1, "maximum": 1024 }] })
    }
}

/// Where the access log goes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum AccessLog {
    /// Standard output.
    #[default]
    Stdout,
    /// Nowhere.
    Off,
    /// A file, appended to.
    File(PathBuf),
}

impl<'de> Deserialize<'de> for AccessLog {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = AccessLog;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("stdout, off or the path of a file")
            }

            fn visit_str<E: de::Error>(self, word: &str) -> Result<AccessLog, E> {
                match word {
                    "stdout" => Ok(AccessLog::Stdout),
                    "off" => Ok(AccessLog::Off),
                    "" => Err(E::invalid_value(de::Unexpected::Str(word), &self)),
                    path => Ok(AccessLog::File(PathBuf::from(path))),
                }
            }

            fn visit_bool<E: de::Error>(self, on: bool) -> Result<AccessLog, E> {
                if on { Err(E::invalid_type(de::Unexpected::Bool(on), &self)) } else { Ok(AccessLog::Off) }
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl JsonSchema for AccessLog {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "AccessLog".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "anyOf": [{ "type": "string", "minLength": 1 }, { "const": false }] })
    }
}

macro_rules! parsed {
    ($name:ident, $expecting:literal, $schema:tt) => {
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Visitor;
                impl de::Visitor<'_> for Visitor {
                    type Value = $name;
                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($expecting)
                    }
                    fn visit_str<E: de::Error>(self, text: &str) -> Result<$name, E> {
                        text.parse().map_err(E::custom)
                    }
                }
                deserializer.deserialize_str(Visitor)
            }
        }

        impl JsonSchema for $name {
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }
            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!($schema)
            }
        }
    };
}

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

/// A moment: RFC 3339 text, or a date (its midnight in UTC).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Timestamp(pub time::OffsetDateTime);

impl FromStr for Timestamp {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        use time::format_description::well_known::Rfc3339;
        let whole = if text.len() == 10 { Cow::from(format!("{text}T00:00:00Z")) } else { Cow::from(text) };
        time::OffsetDateTime::parse(&whole, &Rfc3339)
            .map(Self)
            .map_err(|_| format!("{text:?} is not a moment; write it like 2027-01-01T00:00:00Z"))
    }
}

parsed!(Timestamp, "a moment, like 2027-01-01T00:00:00Z", {
    "type": "string", "description": "A moment, like 2027-01-01T00:00:00Z, or a date"
});

/// Distance from UTC in seconds; written `+08:00`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct UtcOffset(pub i32);

impl FromStr for UtcOffset {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is not a distance from UTC; write it like +08:00 or -05:30");
        let (sign, rest) = match text.split_at_checked(1) {
            Some(("+", rest)) => (1, rest),
            Some(("-", rest)) => (-1, rest),
            _ => return Err(bad()),
        };
        let (hours, minutes) = rest.split_once(':').ok_or_else(bad)?;
        let part = |text: &str, most: i32| {
            let sane = text.len() == 2 && text.bytes().all(|b| b.is_ascii_digit());
            text.parse::<i32>().ok().filter(|number| sane && *number <= most).ok_or_else(bad)
        };
        Ok(Self(sign * (part(hours, 14)? * 3600 + part(minutes, 59)? * 60)))
    }
}

parsed!(UtcOffset, "a distance from UTC, like +08:00", {
    "type": "string", "pattern": "^[+-][0-9]{2}:[0-9]{2}$", "description": "Distance from UTC, like +08:00"
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

    #[test]
    fn moments_and_distances_from_utc_are_read_strictly() {
        assert_eq!("2027-01-01".parse::<Timestamp>(), "2027-01-01T00:00:00Z".parse());
        assert!("tomorrow".parse::<Timestamp>().is_err());
        assert_eq!("+08:00".parse(), Ok(UtcOffset(28_800)));
        assert_eq!("-05:30".parse(), Ok(UtcOffset(-19_800)));
        for bad in ["08:00", "+8:00", "+08", "+15:00", "+08:60", "+0a:00", ""] {
            assert!(bad.parse::<UtcOffset>().is_err(), "{bad}");
        }
    }
}
