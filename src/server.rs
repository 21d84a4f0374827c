//! From a configuration to a running process: listeners, admin port, background tasks, the end on a signal.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use pingora_core::apps::HttpServerApp;
use pingora_core::connectors::ConnectorOptions;
use pingora_core::connectors::http::Connector;
use pingora_core::protocols::http::v2::server::default_h2_options;
use pingora_core::server::configuration::ServerConf;
use pingora_proxy::HttpProxy;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, watch};
use tokio::time::sleep;
use tollgate_filters::access::{AccessLog, AccessSink};
use tollgate_filters::auth::keyring::Keyring;
use tollgate_filters::config::World;
use tollgate_filters::limit::{Ledger, RedisOptions, Watch};
use tollgate_filters::metrics::Metrics;
use tracing_subscriber::EnvFilter;

use crate::admin;
use crate::alerts::{self, Alerts, Couriers};
use crate::config::{self, Document, Loaded, Threads};
use crate::gateway::{ByteBudget, Cut, DRAINS, Gateway};
use crate::listen::{self, Caps, Listening};
use crate::proxy::Proxy;
use crate::runtime::{self, Checked, Lasting, resolve};

/// Pingora logs every client that leaves as an error; the access log has that.
const DEFAULT_LOG: &str = "info,pingora_core=off,pingora_proxy=off,pingora_pool=off";
/// An idle HTTP/2 connection is closed after this.
const H2_IDLE: Duration = Duration::from_secs(120);
/// Window that an HTTP/2 client may fill without waiting: prompts are large.
const H2_WINDOW: u32 = 1 << 20;

/// Sends the process's own log to stderr; `TOLLGATE_LOG` chooses what is logged, in the syntax of `RUST_LOG`.
pub(crate) fn log_to_stderr() {
    let filter = EnvFilter::try_from_env("TOLLGATE_LOG").unwrap_or_else(|_| EnvFilter::new(DEFAULT_LOG));
    let ansi = std::env::var_os("NO_COLOR").is_none() && std::io::IsTerminal::is_terminal(&io::stderr());
    // A second call (two servers in one test process) keeps the first subscriber.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(ansi).try_init();
}

/// The tokio runtime that serves a document.
///
/// # Errors
/// What the operating system says of new threads.
pub(crate) fn tokio_runtime(document: &Document) -> io::Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    if let Threads::Count(count) = document.server.threads {
        builder.worker_threads(count);
    }
    builder.thread_name("tollgate").enable_all().build()
}

/// A gateway that is ready to accept.
pub(crate) struct Server {
    gateway: Arc<Gateway>,
    app: Arc<HttpProxy<Proxy>>,
    listening: Vec<Listening>,
    data: Vec<SocketAddr>,
    admin: TcpListener,
    admin_address: SocketAddr,
    access: admin::Access,
    couriers: Couriers,
    drain: Duration,
}

impl Server {
    /// Builds everything and binds the ports.
    ///
    /// # Errors
    /// A port that is taken, a certificate that does not load, a secret that has gone.
    pub(crate) async fn start(loaded: &Loaded, world: &dyn World) -> io::Result<Self> {
        let document = &loaded.document;
        let metrics = Arc::new(Metrics::new(env!("CARGO_PKG_VERSION")).map_err(io::Error::other)?);
        let ledger = ledger(document, world, &metrics).await?;
        let lasting = Lasting { ledger, keyring: keyring(document, world).await?, metrics: Arc::clone(&metrics) };
        let checked = Checked { document, hash: &loaded.hash };
        let runtime = runtime::build(&checked, None, world, &lasting).map_err(io::Error::other)?;
        resolve::resolve(&runtime).await;
        metrics.set_generation(runtime.generation);
        metrics.reloaded(true);
        let (alerts, couriers) = Alerts::new(document, world, &metrics).map_err(io::Error::other)?;
        let gateway = Arc::new(Gateway {
            alerts,
            live: ArcSwap::from_pointee(runtime),
            connector: connector(document)?,
            ledger: lasting.ledger,
            metrics,
            access: AccessLog::open(&sink(&document.server.access_log))?,
            buffered: ByteBudget::new(document.server.limits.buffered_bytes.0),
            open: AtomicUsize::new(0),
            draining: AtomicBool::new(false),
            leaving: Cut::default(),
            cut: Cut::default(),
            drains: Arc::new(Semaphore::new(DRAINS)),
            started: Instant::now(),
            started_at: SystemTime::now(),
        });
        let listening = listeners(document)?;
        let data = listening.iter().map(|l| l.listener.local_addr()).collect::<io::Result<_>>()?;
        let admin = listen::bind(document.server.admin.bind.0)?;
        let token =
            document.server.admin.token.as_ref().map(|t| t.resolve(world)).transpose().map_err(io::Error::other)?;
        let access =
            admin::Access { token, open_metrics: document.server.admin.metrics == config::MetricsAccess::Open };
        Ok(Self {
            app: Arc::new(proxy(&gateway)),
            gateway,
            listening,
            data,
            admin_address: admin.local_addr()?,
            admin,
            access,
            couriers,
            drain: document.server.drain.0,
        })
    }

    /// Addresses of the data port.
    pub(crate) fn data_addresses(&self) -> &[SocketAddr] {
        &self.data
    }

    /// Address of the admin port.
    pub(crate) fn admin_address(&self) -> SocketAddr {
        self.admin_address
    }

    /// Says on stderr where the gateway listens: the ports are chosen by the system where the configuration says 0.
    pub(crate) fn announce(&self) {
        for address in &self.data {
            tracing::info!("listening data={address}");
        }
        tracing::info!("listening admin={}", self.admin_address);
        tracing::info!("ready");
    }

    /// Serves until SIGTERM (drains: what is open may end) or SIGINT (ends at once).
    ///
    /// # Errors
    /// Signals that cannot be listened for.
    pub(crate) async fn run_until_signal(self) -> io::Result<()> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let (stop, stopping) = watch::channel(false);
        let gateway = Arc::clone(&self.gateway);
        let admin = tokio::spawn(admin::serve(self.admin, Arc::clone(&gateway), self.access));
        let data = tokio::spawn(listen::serve(self.listening, Arc::clone(&self.app), stopping));
        tokio::spawn(resolve::keep_fresh(Arc::clone(&gateway)));
        tokio::spawn(sweep(Arc::clone(&gateway)));
        alerts::start(&gateway, self.couriers);
        tokio::select! {
            _ = terminate.recv() => {
                tracing::info!(open = gateway.open.load(Ordering::Acquire), "draining");
                gateway.draining.store(true, Ordering::Release);
                gateway.leaving.now();
                let _ = stop.send(true);
                self.app.http_cleanup().await;
                drain(&gateway, &mut interrupt, self.drain).await;
            }
            _ = interrupt.recv() => tracing::info!("interrupted"),
        }
        data.abort();
        admin.abort();
        gateway.ledger.flush(Duration::from_secs(2)).await;
        gateway.access.close(Duration::from_secs(2));
        tracing::info!("ended");
        Ok(())
    }
}

/// Time for what was cut to say so and to settle.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Waits until no request is open, at most `patience`; then ends what is left.
async fn drain(gateway: &Gateway, interrupt: &mut tokio::signal::unix::Signal, patience: Duration) {
    let finished = tokio::select! {
        () = idle(gateway) => true,
        () = sleep(patience) => false,
        _ = interrupt.recv() => false,
    };
    if !finished {
        tracing::warn!(open = gateway.open.load(Ordering::Acquire), "drain time is over; what is open is cut");
        gateway.cut.now();
        let _ = tokio::time::timeout(LAST_WORDS, idle(gateway)).await;
    }
}

async fn idle(gateway: &Gateway) {
    while gateway.open.load(Ordering::Acquire) > 0 {
        sleep(Duration::from_millis(20)).await;
    }
}

/// The keys in Redis, if the document asks for them.
async fn keyring(document: &Document, world: &dyn World) -> io::Result<Option<Arc<Keyring>>> {
    let Some(redis) = document.store.redis.as_ref().filter(|_| document.auth.redis_keys) else { return Ok(None) };
    let address = redis.address(world).map_err(io::Error::other)?;
    Ok(Some(Keyring::start(&address, redis.timeout.0).await))
}

/// Where the counters are: the document says; in this process if it says nothing.
async fn ledger(document: &Document, world: &dyn World, metrics: &Arc<Metrics>) -> io::Result<Ledger> {
    let Some(redis) = &document.store.redis else {
        metrics.set_store_up(true);
        return Ok(Ledger::in_memory());
    };
    let address = redis.address(world).map_err(io::Error::other)?;
    let (timeout, when_down, replicas) = (redis.timeout.0, redis.when_down, document.store.replicas);
    let options = RedisOptions { address, timeout, when_down, replicas };
    Ok(Ledger::in_redis(&options, Arc::clone(metrics) as Arc<dyn Watch>).await)
}

/// Lets go of limit state that lies idle, and tells what calls gave back of their providers' grants.
async fn sweep(gateway: Arc<Gateway>) {
    loop {
        sleep(Ledger::SWEEP).await;
        gateway.ledger.sweep();
        let runtime = gateway.live.load_full();
        for budget in runtime.upstreams.values().filter_map(|upstream| upstream.budget.as_ref()) {
            budget.flush(&gateway.ledger, gateway.now()).await;
        }
    }
}

fn sink(written: &config::AccessLog) -> AccessSink {
    match written {
        config::AccessLog::Stdout => AccessSink::Stdout,
        config::AccessLog::Off => AccessSink::Off,
        config::AccessLog::File(path) => AccessSink::File(path.clone()),
    }
}

fn server_conf(document: Option<&Document>) -> ServerConf {
    let pool = document
        .map_or(128, |d| d.upstreams.values().map(|u| u.pool.size * u.nodes.len().max(1)).sum::<usize>().max(128));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    ServerConf { upstream_keepalive_pool_size: pool, threads, max_retries: 3, ..ServerConf::default() }
}

fn connector(document: &Document) -> io::Result<Connector> {
    let options = ConnectorOptions::from_server_conf(&server_conf(Some(document)));
    // Pingora panics where the machine has no certificate store; that is a mistake to be told.
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| Connector::new(Some(options)))).map_err(|_| {
        io::Error::other("the system's CA certificates cannot be loaded (Debian: package ca-certificates)")
    })
}

fn proxy(gateway: &Arc<Gateway>) -> HttpProxy<Proxy> {
    let mut proxy = HttpProxy::new(Proxy { gateway: Arc::clone(gateway) }, Arc::new(server_conf(None)));
    let mut options = pingora_core::apps::HttpServerOptions::default();
    options.h2c = true;
    options.h2_idle_timeout = Some(H2_IDLE);
    proxy.server_options = Some(options);
    let mut h2 = default_h2_options();
    h2.initial_window_size(H2_WINDOW).initial_connection_window_size(2 * H2_WINDOW);
    proxy.h2_options = Some(h2);
    proxy.handle_init_modules();
    proxy
}

fn listeners(document: &Document) -> io::Result<Vec<Listening>> {
    let limits = &document.server.limits;
    let caps = Caps {
        connections: limits.connections,
        per_ip: limits.connections_per_ip,
        header_timeout: limits.header_timeout.0,
    };
    let text = |path: &Path| path.to_string_lossy().into_owned();
    document
        .server
        .listen
        .iter()
        .map(|one| {
            let tls = one.tls.as_ref().map(|t| listen::acceptor(&text(&t.cert), &text(&t.key))).transpose();
            Ok(Listening { listener: listen::bind(one.bind.0)?, tls: tls.map_err(io::Error::other)?, caps })
        })
        .collect()
}
