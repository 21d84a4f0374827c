//! The ways to Redis: by Sentinels, by TLS, with a user of its own.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use serde_json::Value;
use tempfile::TempDir;

use crate::harness::gateway::finish;
use crate::harness::redis::Redis;
use crate::harness::sentinel::Sentinel;
use crate::harness::wire::Oracle;
use crate::harness::{ALICE, Conf, Gateway, PATIENCE, WENDY, chat, eventually, node, tollgate};

const PATH: &str = "/v1/chat/completions";
const ROOMY: &str = "2s";

fn conf(near: &str, redis: &str) -> Conf {
    Conf::serving("qwen", &[near]).also(&format!("store: {{ redis: {{ {redis} }} }}"))
}

async fn ask(gw: &Gateway, key: &str) -> u16 {
    gw.post(PATH).key(key).json(&chat("hi")).send().await.status()
}

async fn counted(gw: &Gateway, key: &str, requests: u64) {
    let seen = std::sync::Mutex::new(Value::Null);
    let what = format!("{requests} requests of {key} to be counted");
    let counted = eventually(&what, || async {
        let answer = gw.get("/v1/quota").key(key).send().await;
        let answer = if answer.status() == 200 { answer.json() } else { return false };
        let rows = answer["limits"].as_array().expect("limits").clone();
        let used = |name: &str| rows.iter().find(|row| row["dimension"] == name).cloned().expect("the dimension");
        *seen.lock().expect("no panic") = answer["limits"].clone();
        used("requests_per_hour")["used"] == requests && used("tokens_per_day")["held"] == 0
    });
    if tokio::time::timeout(PATIENCE - std::time::Duration::from_secs(2), counted).await.is_err() {
        panic!("{what}, not {seen:?}");
    }
}

async fn keys(conf: &Conf, words: &[&str]) -> Value {
    let home = TempDir::new().expect("a temporary directory");
    let file = home.path().join("tollgate.yaml");
    std::fs::write(&file, conf.to_string()).expect("a file");
    let mut command = tollgate(&["keys"]);
    command.args(words).args(["--format", "json", "-c"]).arg(&file);
    let output = finish(command).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// A master, its replica that has all it has, and a Sentinel that knows both.
async fn trio() -> (Redis, Redis, Sentinel) {
    let master = Redis::on_port(&[]);
    let replica = Redis::on_port(&["--replicaof", "127.0.0.1", &master.port().to_string()]);
    eventually("the replica to be in step", || async {
        replica.ask(&["INFO", "replication"]).contains("master_link_status:up")
    })
    .await;
    let sentinel = Sentinel::of(&master);
    eventually("the Sentinel to know the replica", || async { sentinel.is_ready() }).await;
    (master, replica, sentinel)
}

/// Waits until the replica has all that was written.
async fn in_step(master: &Redis, replica: &Redis) {
    let offset = |server: &Redis| {
        let info = server.ask(&["INFO", "replication"]);
        info.lines().find_map(|line| line.strip_prefix("master_repl_offset:").map(|text| text.trim().to_owned()))
    };
    eventually("the replica to have everything", || async {
        let written = offset(master);
        written.is_some() && written == offset(replica)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_the_master_dies_counting_goes_on_at_the_new_one_and_keys_live_on() {
    let ((mut master, replica, sentinel), near) = (trio().await, node("qwen").await);
    let url = format!("url: \"redis+sentinel://127.0.0.1:1,127.0.0.1:{}/main\", timeout: {ROOMY}", sentinel.port());
    let conf = conf(&near.url(), &url).also("auth: { redis_keys: true }");
    let gw = Gateway::with(&conf).await;
    gw.settles("tollgate_store_up", &[], 1.0).await;
    let dora =
        keys(&conf, &["create", "--id", "dora", "--tier", "free"]).await["key"].as_str().expect("a key").to_owned();
    for _ in 0..10 {
        assert_eq!((ask(&gw, ALICE).await, ask(&gw, &dora).await), (200, 200));
    }
    counted(&gw, ALICE, 10).await;
    counted(&gw, &dora, 10).await;
    in_step(&master, &replica).await;

    master.kill();
    let (begin, mut during) = (Instant::now(), 0);
    gw.settles("tollgate_store_up", &[], 0.0).await;
    while gw.metric("tollgate_store_up", &[]).await < 0.5 {
        assert_eq!((ask(&gw, ALICE).await, ask(&gw, &dora).await), (200, 200));
        during += 1;
        assert!(begin.elapsed() < Duration::from_secs(20), "no new master");
        assert!(during < 50, "more than Alice's minute holds");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert_eq!(ask(&gw, ALICE).await, 200);
    counted(&gw, ALICE, 10 + during + 1).await;
    counted(&gw, &dora, 10 + during).await;
    assert!(replica.ask(&["INFO", "replication"]).contains("role:master"));
    assert_eq!(replica.command(&["EXISTS", "tg:{tg}:s:k:alice", "tg:{tg}:s:k:dora"]), "2");
    eventually("no lease", || async { replica.command(&["ZCARD", "tg:{tg}:z"]) == "0" }).await;
    assert_eq!(gw.metric("tollgate_tokens_lost_total", &[]).await, 0.0);

    // The gateway listens at the new master: a revocation is felt there as before.
    eventually("a listener", || async {
        replica.ask(&["PUBSUB", "NUMSUB", "tg:keys"]).starts_with("*2") && replica.calls("subscribe") > 0
    })
    .await;
    keys(&conf, &["revoke", "dora"]).await;
    let begin = Instant::now();
    eventually("the key to be void", || async { ask(&gw, &dora).await == 401 }).await;
    assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_on_purpose_loses_nothing() {
    let ((master, replica, sentinel), near) = (trio().await, node("qwen").await);
    let url = format!("url: \"redis+sentinel://127.0.0.1:{}/main\", timeout: {ROOMY}", sentinel.port());
    let gw = Gateway::with(&conf(&near.url(), &url)).await;
    gw.settles("tollgate_store_up", &[], 1.0).await;
    let mut asked = 0;
    let mut go = async |n: u64| {
        for _ in 0..n {
            assert_eq!(ask(&gw, WENDY).await, 200);
        }
        asked += n;
        asked
    };
    let before = go(20).await;
    counted(&gw, WENDY, before).await;
    in_step(&master, &replica).await;
    sentinel.fail_over().await;
    eventually("the roles to be changed", || async {
        replica.ask(&["INFO", "replication"]).contains("role:master")
            && master.ask(&["INFO", "replication"]).contains("role:slave")
    })
    .await;
    let all = go(20).await;
    gw.settles("tollgate_store_up", &[], 1.0).await;
    counted(&gw, WENDY, all).await;
    let held = replica.command(&["EXISTS", "tg:{tg}:s:k:wendy"]);
    assert_eq!(held, "1");
    eventually("no lease", || async { replica.command(&["ZCARD", "tg:{tg}:z"]) == "0" }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_that_became_read_only_is_left_for_the_one_that_a_sentinel_names() {
    let (old, new, near) = (Redis::on_port(&[]), Redis::on_port(&[]), node("qwen").await);
    let (stale, knows) = (Oracle::naming(old.port()).await, Oracle::naming(old.port()).await);
    let url = format!("url: \"redis+sentinel://{},{}/main\", timeout: {ROOMY}", stale.addr(), knows.addr());
    let gw = Gateway::with(&conf(&near.url(), &url)).await;
    gw.settles("tollgate_store_up", &[], 1.0).await;
    assert_eq!(ask(&gw, WENDY).await, 200);
    counted(&gw, WENDY, 1).await;
    // Connections to the old one stay; it answers every write with READONLY. One Sentinel has not heard of it.
    old.command(&["REPLICAOF", "127.0.0.1", "1"]);
    knows.names(new.port());
    assert_eq!(ask(&gw, WENDY).await, 200);
    let begin = Instant::now();
    eventually("the new master to be asked", || async { new.command(&["EXISTS", "tg:{tg}:s:k:wendy"]) == "1" }).await;
    assert!(begin.elapsed() < Duration::from_secs(4), "{:?}", begin.elapsed());
    gw.settles("tollgate_store_up", &[], 1.0).await;
    assert_eq!(ask(&gw, WENDY).await, 200);
    counted(&gw, WENDY, 2).await;
}

/// Certificates of an authority of the test's own.
struct Authority {
    home: TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("names");
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let home = TempDir::new().expect("a temporary directory");
        std::fs::write(home.path().join("ca.pem"), params.self_signed(&key).expect("a certificate").pem())
            .expect("a file");
        Self { home, issuer: Issuer::new(params, key) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    /// Writes `NAME.pem` and `NAME.key`, for this host.
    fn issues(&self, name: &str, host: &str) {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(vec![host.to_owned()]).expect("names");
        params.distinguished_name.push(DnType::CommonName, name);
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        std::fs::write(self.path(&format!("{name}.pem")), certificate.pem()).expect("a file");
        std::fs::write(self.path(&format!("{name}.key")), key.serialize_pem()).expect("a file");
    }

    /// A server that speaks only TLS on its port, with the certificate of that name.
    fn serves(&self, name: &str, more: &[&str]) -> (Redis, u16) {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let text = |path: PathBuf| path.display().to_string();
        let (ca, cert, key) = (
            text(self.path("ca.pem")),
            text(self.path(&format!("{name}.pem"))),
            text(self.path(&format!("{name}.key"))),
        );
        let port_text = port.to_string();
        let mut all = vec!["--tls-port", &port_text, "--tls-cert-file", &cert, "--tls-key-file", &key];
        all.extend(["--tls-ca-cert-file", &ca]);
        all.extend(more);
        (Redis::with(&all), port)
    }
}

fn show(path: &Path) -> String {
    path.display().to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn by_tls_with_an_own_authority_a_certificate_and_a_password() {
    let (authority, near) = (Authority::new("ours"), node("qwen").await);
    authority.issues("server", "127.0.0.1");
    authority.issues("gate", "gate");
    let (redis, port) = authority.serves("server", &["--tls-auth-clients", "yes", "--requirepass", "pass-word"]);
    let ca = show(&authority.path("ca.pem"));
    let own = format!("cert: {}, key: {}", show(&authority.path("gate.pem")), show(&authority.path("gate.key")));
    let url = format!("url: \"rediss://:pass-word@127.0.0.1:{port}\", timeout: {ROOMY}, when_down: closed");
    let conf = conf(&near.url(), &format!("{url}, ca: {ca}, {own}")).also("auth: { redis_keys: true }");
    let gw = Gateway::with(&conf).await;
    gw.settles("tollgate_store_up", &[], 1.0).await;
    let dora =
        keys(&conf, &["create", "--id", "dora", "--tier", "free"]).await["key"].as_str().expect("a key").to_owned();
    assert_eq!((ask(&gw, ALICE).await, ask(&gw, &dora).await), (200, 200));
    counted(&gw, ALICE, 1).await;
    // Without a certificate of its own the server does not let it in.
    let bare = Gateway::with(&self::conf(&near.url(), &format!("{url}, ca: {ca}"))).await;
    assert_eq!(ask(&bare, ALICE).await, 503);
    drop((redis, gw));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_that_is_not_right_is_an_outage_that_the_log_explains() {
    let (authority, stranger, near) = (Authority::new("ours"), Authority::new("another"), node("qwen").await);
    authority.issues("server", "127.0.0.1");
    authority.issues("other", "redis.example");
    let ca = format!("ca: {}", show(&authority.path("ca.pem")));
    let strange = format!("ca: {}", show(&stranger.path("ca.pem")));
    let cases = [
        ("server", strange.as_str(), "share", 200, "UnknownIssuer"),
        ("other", ca.as_str(), "closed", 503, "not valid for name"),
    ];
    for (name, tls, when_down, status, told) in cases {
        let (_redis, port) = authority.serves(name, &["--tls-auth-clients", "no"]);
        let url = format!("url: \"rediss://:hidden-word@127.0.0.1:{port}\", timeout: {ROOMY}, when_down: {when_down}");
        let gw = Gateway::with(&conf(&near.url(), &format!("{url}, {tls}"))).await;
        assert_eq!(ask(&gw, ALICE).await, status, "{name}");
        assert_eq!(gw.metric("tollgate_store_up", &[]).await, 0.0);
        assert!(gw.output().contains(told) && gw.output().contains("the limit store is away"), "{}", gw.output());
        assert!(!gw.output().contains("hidden-word"));
    }
    let (_redis, port) = authority.serves("server", &["--tls-auth-clients", "no"]);
    let gw = Gateway::with(&conf(&near.url(), &format!("url: \"rediss://127.0.0.1:{port}\", {ca}"))).await;
    gw.settles("tollgate_store_up", &[], 1.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_that_may_only_what_the_gateway_needs_is_enough() {
    let near = node("qwen").await;
    let rights = ["--user", "gate", "on", ">pass-word", "~tg:*", "~user:*", "&tg:*", "+@all", "-@dangerous", "-@admin"];
    let redis = Redis::on_port(&rights);
    let url = |password: &str| format!("url: \"redis://gate:{password}@127.0.0.1:{}\", timeout: {ROOMY}", redis.port());
    let conf = conf(&near.url(), &url("pass-word")).also("auth: { redis_keys: true }");
    let gw = Gateway::with(&conf).await;
    gw.settles("tollgate_store_up", &[], 1.0).await;
    let dora =
        keys(&conf, &["create", "--id", "dora", "--tier", "free"]).await["key"].as_str().expect("a key").to_owned();
    assert_eq!((ask(&gw, ALICE).await, ask(&gw, &dora).await), (200, 200));
    counted(&gw, &dora, 1).await;
    let wrong = Gateway::with(&self::conf(&near.url(), &format!("{}, when_down: closed", url("wrong-word")))).await;
    assert_eq!(ask(&wrong, ALICE).await, 503);
    assert_eq!(wrong.metric("tollgate_store_up", &[]).await, 0.0);
    assert!(
        wrong.output().contains("authentication failed") && !wrong.output().contains("wrong-word"),
        "{}",
        wrong.output()
    );
}
