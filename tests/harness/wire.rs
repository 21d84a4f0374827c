//! A wire between the gateway and Redis that can be cut, and a Sentinel whose word can be changed.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};

/// What a wire does with what it is given.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Mode {
    Forwards,
    /// Takes connections, and passes nothing on until it forwards again.
    Holds,
    /// Gives the first bytes of an answer, then resets the connection.
    Cuts,
}

/// A TCP port in front of a server's socket.
pub(crate) struct Wire {
    addr: SocketAddr,
    mode: Arc<AtomicU8>,
}

impl Wire {
    pub(crate) async fn to(socket: PathBuf) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let addr = listener.local_addr().expect("its address");
        let mode = Arc::new(AtomicU8::new(Mode::Forwards as u8));
        let of_all = Arc::clone(&mode);
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let (socket, mode) = (socket.clone(), Arc::clone(&of_all));
                tokio::spawn(async move {
                    if let Ok(far) = UnixStream::connect(socket).await {
                        carry(near, far, &mode).await;
                    }
                });
            }
        });
        Self { addr, mode }
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://{}", self.addr)
    }

    pub(crate) fn set(&self, mode: Mode) {
        self.mode.store(mode as u8, Ordering::Release);
    }
}

async fn carry(mut near: TcpStream, mut far: UnixStream, mode: &AtomicU8) {
    let is = |wanted: Mode| mode.load(Ordering::Acquire) == wanted as u8;
    let (mut asked, mut answered) = (vec![0; 65_536], vec![0; 65_536]);
    loop {
        let passed = tokio::select! {
            read = near.read(&mut asked) => match read {
                Ok(len @ 1..) => {
                    open(mode).await;
                    far.write_all(&asked[..len]).await
                }
                _ => return,
            },
            read = far.read(&mut answered) => match read {
                Ok(len @ 1..) if is(Mode::Cuts) => {
                    let _ = near.write_all(&answered[..len.min(3)]).await;
                    let _ = socket2::SockRef::from(&near).set_linger(Some(Duration::ZERO));
                    return;
                }
                Ok(len @ 1..) => {
                    open(mode).await;
                    near.write_all(&answered[..len]).await
                }
                _ => return,
            },
        };
        if passed.is_err() {
            return;
        }
    }
}

async fn open(mode: &AtomicU8) {
    while mode.load(Ordering::Acquire) == Mode::Holds as u8 {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// A Sentinel that names whom the test says, and knows nothing else.
pub(crate) struct Oracle {
    addr: SocketAddr,
    master: Arc<AtomicU16>,
}

impl Oracle {
    pub(crate) async fn naming(master: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let addr = listener.local_addr().expect("its address");
        let master = Arc::new(AtomicU16::new(master));
        let named = Arc::clone(&master);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let named = Arc::clone(&named);
                tokio::spawn(async move {
                    let mut question = vec![0; 4_096];
                    while let Ok(1..) = stream.read(&mut question).await {
                        let port = named.load(Ordering::Acquire).to_string();
                        let answer = format!("*2\r\n$9\r\n127.0.0.1\r\n${}\r\n{port}\r\n", port.len());
                        let _ = stream.write_all(answer.as_bytes()).await;
                    }
                });
            }
        });
        Self { addr, master }
    }

    pub(crate) fn names(&self, master: u16) {
        self.master.store(master, Ordering::Release);
    }

    pub(crate) const fn addr(&self) -> SocketAddr {
        self.addr
    }
}
