//! A script in a proxy that counts by plain commands, as its Redis sees it: one after the other, on one connection before
//! the call and on another after it.

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

/// What a call is estimated at, and what is corrected afterwards.
const ESTIMATE: &str = "500";
const CORRECTION: &str = "-200";

/// A connection that asks one thing at a time.
struct Wire {
    stream: BufReader<TcpStream>,
    asked: u64,
}

impl Wire {
    async fn connect(port: u16) -> Result<Self, String> {
        let stream = TcpStream::connect(("127.0.0.1", port)).await.map_err(|error| error.to_string())?;
        stream.set_nodelay(true).map_err(|error| error.to_string())?;
        Ok(Self { stream: BufReader::new(stream), asked: 0 })
    }

    /// A number, or none where there is nothing.
    async fn ask(&mut self, words: &[&str]) -> Result<Option<i64>, String> {
        self.asked += 1;
        let mut text = format!("*{}\r\n", words.len());
        for word in words {
            text.push_str(&format!("${}\r\n{word}\r\n", word.len()));
        }
        self.exchange(&text).await.map_err(|error| error.to_string())?
    }

    async fn exchange(&mut self, text: &str) -> std::io::Result<Result<Option<i64>, String>> {
        self.stream.write_all(text.as_bytes()).await?;
        let mut line = String::new();
        self.stream.read_line(&mut line).await?;
        let line = line.trim_end();
        if let Some(length) = line.strip_prefix('$') {
            let Ok(length) = length.parse::<u64>() else { return Ok(Ok(None)) };
            let mut value = String::new();
            (&mut self.stream).take(length + 2).read_to_string(&mut value).await?;
            return Ok(value.trim_end().parse().map(Some).map_err(|_| format!("no number: {value}")));
        }
        let number = line.strip_prefix(':').and_then(|number| number.parse().ok());
        Ok(number.map(Some).ok_or_else(|| format!("an unexpected answer: {line}")))
    }
}

/// One caller with its two connections.
pub(super) struct Replay {
    before: Wire,
    after: Wire,
}

impl Replay {
    pub(super) async fn connect(port: u16) -> Result<Self, String> {
        Ok(Self { before: Wire::connect(port).await?, after: Wire::connect(port).await? })
    }

    /// Counts the call in the minute and the hour, looks at the day, takes the estimate from it.
    pub(super) async fn begin(&mut self, key: &str) -> Result<(), String> {
        for (window, seconds) in [("minute", "60"), ("hour", "3600")] {
            let counter = format!("rate:{key}:{window}");
            if self.before.ask(&["INCR", &counter]).await? == Some(1) {
                self.before.ask(&["EXPIRE", &counter, seconds]).await?;
            }
        }
        let day = format!("tokens:{key}:day");
        let known = self.before.ask(&["GET", &day]).await?;
        self.before.ask(&["INCRBY", &day, ESTIMATE]).await?;
        if known.is_none() {
            self.before.ask(&["EXPIRE", &day, "86400"]).await?;
        }
        Ok(())
    }

    /// Looks at the day again and corrects it.
    pub(super) async fn end(&mut self, key: &str) -> Result<(), String> {
        let day = format!("tokens:{key}:day");
        self.after.ask(&["GET", &day]).await?;
        self.after.ask(&["INCRBY", &day, CORRECTION]).await?;
        Ok(())
    }

    /// Questions asked before calls, and after them.
    pub(super) fn asked(&self) -> (u64, u64) {
        (self.before.asked, self.after.asked)
    }
}
