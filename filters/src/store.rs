//! Where Redis is, and how it is reached: one server by TCP, TLS or a socket of this machine, or whichever server
//! Sentinels name as the master. Counters and keys connect alike.

mod tls;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use redis::aio::{MultiplexedConnection, PubSub};
use redis::{AsyncConnectionConfig, ConnectionAddr, IntoConnectionInfo, RedisConnectionInfo, RedisError};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinHandle;

pub use tls::Tls;

/// How long one step on the way to a server may take: a connection, a handshake, a login, the question who is master.
const STEP: Duration = Duration::from_millis(250);
/// Longest wait for an answer on a connection, whatever its user allows.
const ANSWER: Duration = Duration::from_secs(1);
/// Commands that may wait to be written.
const PIPELINE: usize = 2_048;
const REDIS_PORT: u16 = 6_379;
const SENTINEL_PORT: u16 = 26_379;

/// A server by name or address.
#[derive(Clone, PartialEq, Eq)]
struct Host {
    name: Box<str>,
    port: u16,
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name.contains(':') {
            true => write!(f, "[{}]:{}", self.name, self.port),
            false => write!(f, "{}:{}", self.name, self.port),
        }
    }
}

#[derive(Clone)]
enum Place {
    Socket(PathBuf),
    Server(Host),
    /// Whoever is the master of that name.
    Sentinels(Arc<Sentinels>),
}

struct Sentinels {
    hosts: Box<[Host]>,
    master: Box<str>,
    /// The one that answered last is asked first.
    first: AtomicUsize,
}

/// What `store.redis.url` says, with what TLS needs.
#[derive(Clone)]
pub struct Address {
    place: Place,
    login: RedisConnectionInfo,
    secure: bool,
    tls: Option<Tls>,
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Address(***)")
    }
}

impl Address {
    /// Reads `redis://`, `rediss://`, `unix://`, or with Sentinels
    /// `redis+sentinel://[user:password@]host[:port],host[:port]/MASTER[/DB]` and `rediss+sentinel://`.
    ///
    /// # Errors
    /// What is wrong with it; never the address, which may hold a password.
    pub fn parse(url: &str) -> Result<Self, String> {
        let (scheme, rest) = url.split_once("://").ok_or("it has no scheme")?;
        if rest.contains('#') {
            return Err("it has a `#`; in a password that is written %23".to_owned());
        }
        match scheme {
            "redis" | "rediss" => {
                let (login, place) = server(rest)?;
                Ok(Self { place, login, secure: scheme == "rediss", tls: None })
            }
            "unix" | "redis+unix" => {
                let info = redis_url(&format!("redis+unix://{rest}"))?;
                let ConnectionAddr::Unix(path) = info.addr() else { return Err("it has no path".to_owned()) };
                Ok(Self {
                    place: Place::Socket(path.clone()),
                    login: info.redis_settings().clone(),
                    secure: false,
                    tls: None,
                })
            }
            "redis+sentinel" | "rediss+sentinel" => {
                let (login, place) = sentinels(rest)?;
                Ok(Self { place, login, secure: scheme == "rediss+sentinel", tls: None })
            }
            _ => Err("its scheme is none of redis, rediss, unix, redis+sentinel, rediss+sentinel".to_owned()),
        }
    }

    /// Whether it is to be reached by TLS.
    pub const fn is_secure(&self) -> bool {
        self.secure
    }

    /// The same address, reached with these certificates. Without them, a secure address trusts the system's authorities.
    #[must_use]
    pub fn with_tls(mut self, tls: Tls) -> Self {
        self.tls = Some(tls);
        self
    }

    /// A new connection for commands; with Sentinels, to the server that is the master now. Must be called in a tokio
    /// runtime. Takes no longer than half a second, and as much again for every Sentinel that does not answer.
    ///
    /// # Errors
    /// What went wrong, in words for the log.
    pub async fn connect(&self) -> Result<Connection, String> {
        let stream = self.reach().await?;
        Connection::over(stream, &self.login).await
    }

    /// A new connection for subscriptions. Else as [`Address::connect`].
    ///
    /// # Errors
    /// As [`Address::connect`].
    pub async fn listen(&self) -> Result<PubSub, String> {
        let stream = self.reach().await?;
        in_time("the login", PubSub::new(&self.login, stream)).await
    }

    async fn reach(&self) -> Result<Stream, String> {
        match &self.place {
            Place::Socket(path) => {
                let stream = in_time("the connection", UnixStream::connect(path)).await?;
                Ok(Box::new(stream))
            }
            Place::Server(host) => self.dial(host).await,
            Place::Sentinels(sentinels) => self.master(sentinels).await,
        }
    }

    async fn dial(&self, host: &Host) -> Result<Stream, String> {
        let stream = in_time("the connection", TcpStream::connect((&*host.name, host.port))).await;
        let stream = stream.map_err(|why| format!("{host}: {why}"))?;
        // A question is small and waited for.
        stream.set_nodelay(true).map_err(|error| error.to_string())?;
        if !self.secure {
            return Ok(Box::new(stream));
        }
        let tls = self.tls.clone().map_or_else(|| Tls::new(None, None), Ok)?;
        let stream = in_time("TLS", tls.handshake(&host.name, stream)).await;
        Ok(Box::new(stream.map_err(|why| format!("{host}: {why}"))?))
    }

    /// A stream to the master that the first Sentinel names whose word is right.
    async fn master(&self, sentinels: &Sentinels) -> Result<Stream, String> {
        let first = sentinels.first.load(Ordering::Relaxed);
        let mut wrong = "there is no Sentinel".to_owned();
        for turn in 0..sentinels.hosts.len() {
            let at = (first + turn) % sentinels.hosts.len();
            let Some(host) = sentinels.hosts.get(at) else { continue };
            match self.master_by(host, &sentinels.master).await {
                Ok(stream) => {
                    sentinels.first.store(at, Ordering::Relaxed);
                    return Ok(stream);
                }
                Err(why) => wrong = why,
            }
        }
        Err(wrong)
    }

    async fn master_by(&self, sentinel: &Host, name: &str) -> Result<Stream, String> {
        let bare = RedisConnectionInfo::default().set_skip_set_lib_name();
        let mut answer = self.ask_sentinel(sentinel, name, &bare).await;
        // Sentinels that want a password get that of the servers; others are not told it.
        if answer.as_ref().is_err_and(|why| why.contains("NOAUTH")) && self.login.password().is_some() {
            answer = self.ask_sentinel(sentinel, name, &self.login.clone().set_db(0).set_skip_set_lib_name()).await;
        }
        let Some((host, port)) = answer.map_err(|why| format!("Sentinel {sentinel}: {why}"))? else {
            return Err(format!("Sentinel {sentinel} knows no master `{name}`"));
        };
        let master = Host { name: host.into(), port };
        // What a Sentinel says may be old: a server that was demoted says so itself.
        let role = Connection::over(self.dial(&master).await?, &self.login).await?;
        let role = redis::cmd("ROLE").query_async::<Vec<redis::Value>>(&mut role.commands()).await;
        let role = role.map_err(|error| format!("{master}: {error}"))?;
        let role: String =
            role.into_iter().next().and_then(|role| redis::from_redis_value(role).ok()).unwrap_or_default();
        if role != "master" {
            return Err(format!("{master} is not the master although Sentinel {sentinel} says so"));
        }
        self.dial(&master).await
    }

    async fn ask_sentinel(
        &self,
        sentinel: &Host,
        master: &str,
        login: &RedisConnectionInfo,
    ) -> Result<Option<(String, u16)>, String> {
        let connection = Connection::over(self.dial(sentinel).await?, login).await?;
        let mut question = redis::cmd("SENTINEL");
        question.arg("GET-MASTER-ADDR-BY-NAME").arg(master);
        let mut commands = connection.commands();
        in_time("the answer", question.query_async::<Option<(String, u16)>>(&mut commands)).await
    }
}

/// A way to a server, whatever it is made of.
trait Wire: AsyncRead + AsyncWrite + Send + Unpin + 'static {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Wire for T {}

type Stream = Box<dyn Wire>;

/// A connection for commands, shared by whoever asks; it ends when it is dropped.
pub struct Connection {
    commands: MultiplexedConnection,
    driver: JoinHandle<()>,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").finish_non_exhaustive()
    }
}

impl Connection {
    async fn over(stream: Stream, login: &RedisConnectionInfo) -> Result<Self, String> {
        let config = AsyncConnectionConfig::new().set_response_timeout(Some(ANSWER)).set_pipeline_buffer_size(PIPELINE);
        let login = MultiplexedConnection::new_with_config(login, stream, config);
        let (commands, driver) = in_time("the login", login).await?;
        Ok(Self { commands, driver: tokio::spawn(driver) })
    }

    /// A handle to send commands with, good for as long as the connection is.
    pub fn commands(&self) -> MultiplexedConnection {
        self.commands.clone()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // A peer that takes nothing any more would keep it for ever.
        self.driver.abort();
    }
}

/// Whether nothing that is asked of this server can succeed at the moment, so that it is no use to go on with it.
pub fn is_useless(error: &RedisError) -> bool {
    const CODES: [&str; 8] =
        ["READONLY", "LOADING", "MASTERDOWN", "CLUSTERDOWN", "MISCONF", "NOAUTH", "NOPERM", "NOREPLICAS"];
    error.is_connection_dropped() || error.is_io_error() || error.code().is_some_and(|code| CODES.contains(&code))
}

async fn in_time<T, E: fmt::Display>(
    what: &str,
    step: impl Future<Output = std::result::Result<T, E>>,
) -> Result<T, String> {
    match tokio::time::timeout(STEP, step).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("{what} takes too long")),
    }
}

fn redis_url(url: &str) -> Result<redis::ConnectionInfo, String> {
    url.into_connection_info().map_err(|error| {
        // The error's words are fixed; its details could repeat the address.
        let words = error.to_string();
        let known = ["database number", "hostname", "wildcard", "UTF-8", "path"];
        match known.iter().find(|known| words.to_lowercase().contains(&known.to_lowercase())) {
            Some(&"database number") => "its database is not a number".to_owned(),
            Some(&"hostname") => "it has no host".to_owned(),
            Some(&"wildcard") => "its host is an address to listen on, not one to connect to".to_owned(),
            Some(&"path") => "it has no path of a socket".to_owned(),
            _ => "it cannot be read; special characters of a password are written as %XX".to_owned(),
        }
    })
}

fn server(rest: &str) -> Result<(RedisConnectionInfo, Place), String> {
    let info = redis_url(&format!("redis://{rest}"))?;
    let ConnectionAddr::Tcp(name, port) = info.addr() else { return Err("it has no host".to_owned()) };
    let host = Host { name: name.as_str().into(), port: *port };
    Ok((info.redis_settings().clone(), Place::Server(host)))
}

fn sentinels(rest: &str) -> Result<(RedisConnectionInfo, Place), String> {
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let (login, hosts) = authority.rsplit_once('@').map_or(("", authority), |(login, hosts)| (login, hosts));
    let (master, db) = path.split_once('/').unwrap_or((path, ""));
    if master.is_empty() || master.contains(['?', '&']) {
        return Err("behind the Sentinels it needs the master's name: redis+sentinel://host,host/MASTER".to_owned());
    }
    let one = |text: &str| -> Result<Host, String> {
        let (_, Place::Server(mut host)) = server(text)? else { return Err("it has no host".to_owned()) };
        let has_port = text.rsplit_once(']').map_or(text, |(_, port)| port).contains(':');
        if !has_port && host.port == REDIS_PORT {
            host.port = SENTINEL_PORT;
        }
        Ok(host)
    };
    let hosts: Box<[Host]> = hosts.split(',').map(one).collect::<Result<_, _>>()?;
    let at = if login.is_empty() { "" } else { "@" };
    let (login, _) = server(&format!("{login}{at}host/{db}"))?;
    let sentinels = Sentinels { hosts, master: master.into(), first: AtomicUsize::new(0) };
    Ok((login, Place::Sentinels(Arc::new(sentinels))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts(address: &Address) -> Vec<String> {
        match &address.place {
            Place::Socket(path) => vec![path.display().to_string()],
            Place::Server(host) => vec![host.to_string()],
            Place::Sentinels(all) => all.hosts.iter().map(ToString::to_string).collect(),
        }
    }

    #[test]
    fn every_form_of_an_address_is_understood() {
        let cases = [
            ("redis://127.0.0.1", "127.0.0.1:6379", false, 0),
            ("redis://:p%40ss@redis.internal:7000/3", "redis.internal:7000", false, 3),
            ("rediss://[::1]:6380", "[::1]:6380", true, 0),
            ("unix:///run/redis.sock?db=2", "/run/redis.sock", false, 2),
            ("redis+unix:///run/redis.sock", "/run/redis.sock", false, 0),
            ("redis+sentinel://a,b:7,[::1],[::1]:8/main/5", "a:26379 b:7 [::1]:26379 [::1]:8", false, 5),
            ("rediss+sentinel://u:p@a:6379/main", "a:6379", true, 0),
        ];
        for (url, expected, secure, db) in cases {
            let address = Address::parse(url).unwrap();
            assert_eq!(hosts(&address).join(" "), expected, "{url}");
            assert_eq!((address.is_secure(), address.login.db()), (secure, db), "{url}");
        }
        let login = Address::parse("redis+sentinel://ann:p%40ss@a,b/main").unwrap().login;
        assert_eq!((login.username(), login.password()), (Some("ann"), Some("p@ss")));
    }

    #[test]
    fn a_bad_address_is_told_without_its_password() {
        let cases = [
            ("localhost", "no scheme"),
            ("http://u:hidden@h", "scheme"),
            ("redis://u:hidden@", "cannot be read"),
            ("redis://u:hidden@h:port", "cannot be read"),
            ("redis://u:hidden@h/five", "not a number"),
            ("redis://u:hid#den@h", "%23"),
            ("redis://0.0.0.0", "listen on"),
            ("redis+sentinel://u:hidden@a,b", "master's name"),
            ("redis+sentinel://u:hidden@a,b/", "master's name"),
            ("redis+sentinel://u:hidden@a,,b/main", "no host"),
            ("redis+sentinel://u:hidden@a/main/five", "not a number"),
        ];
        for (url, expected) in cases {
            let why = Address::parse(url).unwrap_err();
            assert!(why.contains(expected), "{url}: {why}");
            assert!(!why.contains("hid"), "{why}");
        }
        let address = Address::parse("redis://u:hidden@h").unwrap();
        assert!(!format!("{address:?}").contains("hidden"));
    }
}
