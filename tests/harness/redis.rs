//! A real redis-server of a test's own, and a word with it.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::PATIENCE;

/// A running server on a socket, killed when the test lets go of it.
pub(crate) struct Redis {
    child: Child,
    home: TempDir,
    more: Vec<String>,
    env: Vec<(&'static str, String)>,
}

impl Redis {
    pub(crate) fn start() -> Self {
        Self::with(&[])
    }

    /// A server with further settings on its command line.
    pub(crate) fn with(more: &[&str]) -> Self {
        Self::in_env(more, Vec::new())
    }

    /// A server whose clock starts at that time, like `2026-03-01 23:59:50` (UTC), and runs so many times as fast.
    pub(crate) fn at(time: &str, speed: u32) -> Self {
        // The C library is named a second time so that its allocator comes before the one that the server is linked with:
        // that one looks at the clock before the library that tells the time is ready.
        let env = vec![
            ("LD_PRELOAD", format!("{} libc.so.6", faketime().display())),
            ("FAKETIME", format!("@{time} x{speed}")),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
            ("TZ", "UTC".to_owned()),
        ];
        Self::in_env(&[], env)
    }

    fn in_env(more: &[&str], env: Vec<(&'static str, String)>) -> Self {
        let home = TempDir::new().expect("a temporary directory");
        let more: Vec<String> = more.iter().map(ToString::to_string).collect();
        Self { child: launch(&home, &more, &env), home, more, env }
    }

    /// Kills it and starts it again, with nothing in it.
    pub(crate) fn restart(&mut self) {
        self.kill();
        self.child = launch(&self.home, &self.more, &self.env);
    }

    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub(crate) fn url(&self) -> String {
        format!("redis+unix://{}", self.home.path().join("redis.sock").display())
    }

    /// Sends a signal, like `STOP`.
    pub(crate) fn signal(&self, name: &str) {
        let status = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status();
        assert!(status.expect("kill runs").success());
    }

    /// Watches what scripts write from now on.
    pub(crate) fn watch(&self) -> Watched {
        let mut lines = BufReader::new(self.send(&["MONITOR"]));
        let mut line = String::new();
        lines.read_line(&mut line).expect("an answer");
        assert_eq!(line, "+OK\r\n");
        let watched = Watched(Arc::default());
        let told = Watched(Arc::clone(&watched.0));
        thread::spawn(move || lines.lines().map_while(Result::ok).for_each(|line| told.line(&line)));
        watched
    }

    /// The server's time in microseconds since 1970.
    pub(crate) fn now(&self) -> u64 {
        let time = "local t = redis.call('TIME') return t[1] * 1000000 + t[2]";
        self.command(&["EVAL", time, "0"]).parse().expect("a number")
    }

    /// Makes every lease expire at once, as if its time had passed.
    pub(crate) fn expire_leases(&self) {
        let expire =
            "for _, id in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do redis.call('ZADD', KEYS[1], 1, id) end";
        self.command(&["EVAL", expire, "1", "tg:{tg}:z"]);
    }

    /// Leases there are, those among them that expired.
    pub(crate) fn leases(&self) -> usize {
        self.command(&["ZCARD", "tg:{tg}:z"]).parse().expect("a number")
    }

    /// One command whose answer is a text, like `INFO`.
    pub(crate) fn text(&self, words: &[&str]) -> String {
        let mut reader = BufReader::new(self.send(words));
        let mut line = String::new();
        reader.read_line(&mut line).expect("an answer");
        let length = line.trim_end().strip_prefix('$').and_then(|length| length.parse().ok());
        let mut text = vec![0; length.unwrap_or_else(|| panic!("{words:?}: {line}"))];
        reader.read_exact(&mut text).expect("the whole answer");
        String::from_utf8(text).expect("UTF-8")
    }

    fn send(&self, words: &[&str]) -> UnixStream {
        let mut stream = UnixStream::connect(self.home.path().join("redis.sock")).expect("redis-server listens");
        let mut text = format!("*{}\r\n", words.len());
        words.iter().for_each(|word| text.push_str(&format!("${}\r\n{word}\r\n", word.len())));
        stream.write_all(text.as_bytes()).expect("a command is sent");
        stream.set_read_timeout((words != ["MONITOR"]).then_some(PATIENCE)).expect("a timeout");
        stream
    }

    /// One command; its answer if that is a number or a line.
    pub(crate) fn command(&self, words: &[&str]) -> String {
        let mut line = String::new();
        BufReader::new(self.send(words)).read_line(&mut line).expect("an answer");
        assert!(!line.starts_with('-'), "{words:?}: {line}");
        line.trim_end().trim_start_matches([':', '+', '$']).to_owned()
    }
}

/// When each lease was given by the server's clock, in microseconds, and what was said of it when it was written.
#[derive(Default)]
struct Given {
    at: HashMap<String, u64>,
    text: HashMap<String, String>,
}

/// What a server's scripts write, as it tells whoever asks to watch.
pub(crate) struct Watched(Arc<Mutex<Given>>);

impl Watched {
    /// When leases of calls of this key were given, in order.
    pub(crate) fn admissions(&self, key: &str) -> Vec<u64> {
        let given = self.0.lock().expect("leases");
        let scope = format!("tg:{{tg}}:s:k:{key}");
        let of_key = |id: &&String| given.text.get(*id).is_some_and(|text| text.contains(&scope));
        let mut times: Vec<u64> = given.at.keys().filter(of_key).map(|id| given.at[id]).collect();
        times.sort_unstable();
        times
    }

    fn line(&self, line: &str) {
        let Some((head, command)) = line.split_once(" lua] ") else { return };
        let words: Vec<&str> = command.splitn(4, ' ').map(|word| word.trim_matches('"')).collect();
        let mut given = self.0.lock().expect("leases");
        match words.as_slice() {
            // Only the first: later ones renew it, or bury it.
            ["ZADD", "tg:{tg}:z", expiry, id] => {
                // The server tells when it wrote; the expiry is exact, and lies whole seconds after the admission.
                let expiry: u64 = expiry.parse().expect("a time");
                let stamp = head.split(' ').next().unwrap_or_default().replace('.', "");
                let ttl = expiry.saturating_sub(stamp.parse().expect("a time"));
                given.at.entry((*id).to_owned()).or_insert(expiry - (ttl + 500_000) / 1_000_000 * 1_000_000);
            }
            ["HSET", "tg:{tg}:l", id, text] => {
                given.text.entry((*id).to_owned()).or_insert_with(|| (*text).to_owned());
            }
            _ => {}
        }
    }
}

/// The library that lets a process see another time.
fn faketime() -> PathBuf {
    let places = std::fs::read_dir("/usr/lib").expect("/usr/lib").flatten().map(|entry| entry.path());
    let mut found = places.map(|place| place.join("faketime/libfaketime.so.1")).filter(|path| path.exists());
    found.next().expect("libfaketime is needed for this test (Debian: apt-get install faketime)")
}

fn launch(home: &TempDir, more: &[String], env: &[(&'static str, String)]) -> Child {
    let socket = home.path().join("redis.sock");
    let _ = std::fs::remove_file(&socket);
    let child = Command::new("redis-server")
        .args(["--port", "0", "--save", "", "--appendonly", "no", "--unixsocket"])
        .arg(&socket)
        .args(more)
        .envs(env.iter().map(|(name, value)| (name, value)))
        .current_dir(home.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let child = child.unwrap_or_else(|error| {
        panic!(
            "redis-server is needed for this test and does not start: {error} (Debian: apt-get install redis-server)"
        )
    });
    let patience = Instant::now() + PATIENCE;
    while UnixStream::connect(&socket).is_err() {
        assert!(Instant::now() < patience, "redis-server did not listen");
        std::thread::sleep(Duration::from_millis(5));
    }
    child
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.kill();
    }
}
