//! Checks of `server:` and `store:`.

use tollgate_filters::config::SecretSource;
use tollgate_filters::store::Address;

use super::{At, Check};
use crate::config::{Bind, MetricsAccess, Redis};

impl Check<'_> {
    pub(super) fn server(&mut self) {
        let server = &self.document.server;
        let at = At::root().key("server");
        if server.listen.is_empty() {
            self.error(&at.key("listen"), "no data port", Some("add `- bind: 127.0.0.1:8080`".to_owned()));
        }
        for (index, listen) in server.listen.iter().enumerate() {
            let at = at.key("listen").item(index);
            if let Some(tls) = &listen.tls {
                self.readable(&at.key("tls").key("cert"), &tls.cert);
                self.readable(&at.key("tls").key("key"), &tls.key);
            }
        }
        self.binds();
        self.admin();
        let limits = &server.limits;
        let at = at.key("limits");
        self.positive(&at.key("connections"), limits.connections as u64);
        self.positive(&at.key("connections_per_ip"), limits.connections_per_ip as u64);
        self.positive(&at.key("body_bytes"), limits.body_bytes.0);
        self.lasting(&at.key("header_timeout"), limits.header_timeout);
        if limits.header_bytes.0 < 1024 {
            self.error(&at.key("header_bytes"), "too small for any request", Some("the least is 1KiB".to_owned()));
        }
        if limits.buffered_bytes < limits.body_bytes {
            let message = format!("less than one body ({})", limits.body_bytes);
            self.error(&at.key("buffered_bytes"), message, Some("raise it, or lower body_bytes".to_owned()));
        }
    }

    fn admin(&mut self) {
        let admin = &self.document.server.admin;
        let at = At::root().key("server").key("admin");
        if let Some(token) = &admin.token {
            self.secret(&at.key("token"), token);
        } else if !admin.bind.0.ip().is_loopback() && !self.places.lost(&at.key("token")) {
            let message = format!("the admin port on {} needs a token", admin.bind);
            let hint = "add `token: { env: TOLLGATE_ADMIN_TOKEN }`, or bind it to 127.0.0.1";
            self.error(&at.key("bind"), message, Some(hint.to_owned()));
        }
        if admin.metrics == MetricsAccess::Token && admin.token.is_none() && !self.places.lost(&at.key("token")) {
            self.error(&at.key("metrics"), "there is no token to ask for", Some("add `token:`".to_owned()));
        }
    }

    /// Two listeners on one address cannot both start. Port 0 is a fresh one each time.
    fn binds(&mut self) {
        let server = &self.document.server;
        let at = At::root().key("server");
        let mut seen: Vec<(Bind, At)> = vec![(server.admin.bind, at.key("admin").key("bind"))];
        for (index, listen) in server.listen.iter().enumerate() {
            let here = at.key("listen").item(index).key("bind");
            let taken = |bind: &Bind| {
                bind.0.port() != 0
                    && bind.0.port() == listen.bind.0.port()
                    && bind.0.is_ipv4() == listen.bind.0.is_ipv4()
                    && (bind.0.ip() == listen.bind.0.ip()
                        || bind.0.ip().is_unspecified()
                        || listen.bind.0.ip().is_unspecified())
            };
            if let Some((bind, _)) = seen.iter().find(|(bind, _)| taken(bind)) {
                let message = format!("{} is already taken by {bind}", listen.bind);
                self.error(&here, message, Some("every listener needs an address of its own".to_owned()));
            }
            seen.push((listen.bind, here));
        }
    }

    pub(super) fn store(&mut self) {
        let store = &self.document.store;
        let at = At::root().key("store");
        self.positive(&at.key("replicas"), store.replicas);
        let Some(redis) = &store.redis else { return };
        let at = at.key("redis");
        self.lasting(&at.key("timeout"), redis.timeout);
        let url = match &redis.url {
            // Without a user or password there is nothing secret in it.
            SecretSource::Plain(url) if !url.is_empty() && !url.expose().contains('@') => Some(url.clone()),
            source => self.secret(&at.key("url"), source),
        };
        if let Some(url) = url {
            match Address::parse(url.expose()) {
                Ok(address) => self.certificates(&at, redis, address.is_secure()),
                // The address may hold a password and is not repeated.
                Err(why) => {
                    let hint = "redis://, rediss:// or unix://; with Sentinels redis+sentinel://HOST,HOST/MASTER";
                    self.error(&at.key("url"), format!("not the address of a Redis: {why}"), Some(hint.to_owned()));
                }
            }
        }
    }

    fn certificates(&mut self, at: &At, redis: &Redis, secure: bool) {
        let written = [("ca", &redis.ca), ("cert", &redis.cert), ("key", &redis.key)];
        let Some((name, _)) = written.iter().find(|(_, path)| path.is_some()) else { return };
        if !secure {
            let hint = "write rediss:// or rediss+sentinel://, or leave it out";
            self.error(&at.key(name), "the address is not one for TLS", Some(hint.to_owned()));
        } else if redis.cert.is_some() != redis.key.is_some() {
            let (here, lacks) = if redis.cert.is_some() { ("cert", "key") } else { ("key", "cert") };
            self.error(&at.key(here), format!("it needs `{lacks}` beside it"), None);
        } else if let Err(why) = redis.tls(self.world) {
            self.error(at, why, None);
        }
    }
}
