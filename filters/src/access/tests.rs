use std::io::{BufRead, BufReader, Read};

use super::*;

const FIELDS: &str = "ts, request_id, trace_id, key, tier, route, model, upstream, node, attempts, status, code, stream, \
    input_tokens, cached_tokens, output_tokens, usage_source, cost, ttft_ms, duration_ms, overhead_ms, cache, client_ip, \
    bytes_in, bytes_out";

const PATIENCE: Duration = Duration::from_secs(60);

fn line(request_id: &str) -> AccessLine<'_> {
    AccessLine {
        ts: SystemTime::UNIX_EPOCH + Duration::from_millis(1_767_225_600_007),
        request_id,
        trace_id: None,
        key: None,
        tier: None,
        route: None,
        model: None,
        upstream: None,
        node: None,
        attempts: 0,
        status: None,
        code: None,
        stream: None,
        input_tokens: None,
        cached_tokens: None,
        output_tokens: None,
        usage_source: None,
        cost: None,
        ttft_ms: None,
        duration_ms: None,
        overhead_ms: None,
        cache: None,
        client_ip: None,
        bytes_in: 0,
        bytes_out: 0,
    }
}

fn text(line: &AccessLine<'_>) -> String {
    let mut out = Vec::new();
    line.write_to(&mut out).unwrap();
    String::from_utf8(out).unwrap()
}

/// A fresh directory that is removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("tollgate-access-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn every_field_of_the_contract_is_always_there_and_in_its_order() {
    let text = text(&line("req_1"));
    let found: Vec<&str> =
        text.split('"').skip(1).step_by(2).filter(|word| FIELDS.split(", ").any(|f| f == *word)).collect();
    assert_eq!(found.join(", "), FIELDS);
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json.as_object().unwrap().len(), FIELDS.split(", ").count());
    assert_eq!(json["status"], serde_json::Value::Null);
}

#[test]
fn a_full_line_reads_as_written() {
    let full = AccessLine {
        key: Some("alice"),
        status: Some(200),
        stream: Some(true),
        cost: Some(0.001_25),
        ttft_ms: Some(Duration::from_micros(12_345)),
        duration_ms: Some(Duration::from_secs(2)),
        client_ip: Some("2001:db8::1".parse().unwrap()),
        bytes_out: 9,
        ..line("req_1")
    };
    let json: serde_json::Value = serde_json::from_str(&text(&full)).unwrap();
    assert_eq!(json["ts"], "2026-01-01T00:00:00.007Z");
    assert_eq!((&json["key"], &json["status"], &json["stream"]), (&"alice".into(), &200.into(), &true.into()));
    assert_eq!((&json["ttft_ms"], &json["duration_ms"]), (&12.345.into(), &2000.0.into()));
    assert_eq!((&json["cost"], &json["client_ip"]), (&0.001_25.into(), &"2001:db8::1".into()));
}

#[test]
fn whatever_stands_in_a_field_a_line_stays_one_line_of_json() {
    let nasty = "a\"b\\c\nd\r\u{0}\u{1b}[31m\u{2028}é";
    let text = text(&AccessLine { model: Some(nasty), cost: Some(f64::NAN), ..line(nasty) });
    assert_eq!(text.matches('\n').count(), 1);
    assert!(text.chars().all(|c| c == '\n' || !c.is_control()));
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&json["model"], &json["cost"]), (&nasty.into(), &serde_json::Value::Null));
}

#[test]
fn a_reader_that_does_not_read_blocks_nobody_and_every_line_is_written_or_counted() {
    let (reader, writer) = io::pipe().unwrap();
    // A buffer larger than any pipe, so that the thread blocks whenever it comes to run; and far more lines than pipe, thread
    // and buffer hold together. Were a write to wait, this loop would not end.
    let log = AccessLog::start(Out::Stream(Box::new(writer)), 2 << 20).unwrap();
    let total = 20_000;
    for n in 0..total {
        log.write(&line(&n.to_string()));
    }
    assert!(log.dropped() > 0);
    assert!(!log.close(Duration::from_millis(20)), "the thread is still blocked");
    log.write(&line("late"));

    let read = thread::spawn(move || BufReader::new(reader).lines().map(Result::unwrap).collect::<Vec<_>>());
    assert!(log.close(PATIENCE));
    let lines = read.join().unwrap();
    assert_eq!(lines.len() as u64 + log.dropped(), total + 1);
    assert!(lines.iter().all(|line| serde_json::from_str::<serde_json::Value>(line).is_ok()));
}

#[test]
fn a_reader_that_is_gone_costs_lines_and_nothing_else() {
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    let log = AccessLog::start(Out::Stream(Box::new(writer)), WAITING_BYTES).unwrap();
    for _ in 0..50 {
        log.write(&line("req"));
    }
    assert!(log.close(PATIENCE));
    assert_eq!(log.dropped(), 50);
}

#[test]
fn lines_of_many_threads_do_not_mix() {
    let (mut reader, writer) = io::pipe().unwrap();
    let log = AccessLog::start(Out::Stream(Box::new(writer)), WAITING_BYTES).unwrap();
    let read = thread::spawn(move || {
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        text
    });
    thread::scope(|scope| {
        for thread in 0..4 {
            let log = &log;
            scope.spawn(move || (0..200).for_each(|n| log.write(&line(&format!("{thread}-{n}")))));
        }
    });
    assert!(log.close(PATIENCE));
    drop(log);
    let text = read.join().unwrap();
    let mut ids: Vec<String> = text
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["request_id"].as_str().unwrap().to_owned())
        .collect();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 800);
}

#[test]
fn after_a_rename_and_reopen_lines_go_to_a_new_file_and_none_is_lost() {
    let scratch = Scratch::new("rename");
    let (path, old) = (scratch.0.join("access.log"), scratch.0.join("access.log.1"));
    let log = AccessLog::open(&AccessSink::File(path.clone())).unwrap();
    log.write(&line("before"));
    std::fs::rename(&path, &old).unwrap();
    log.reopen();
    log.write(&line("after"));
    assert!(log.close(PATIENCE));
    let (old, new) = (std::fs::read_to_string(old).unwrap(), std::fs::read_to_string(path).unwrap());
    assert!(new.contains("\"after\"") && !old.contains("\"after\""));
    assert_eq!(format!("{old}{new}").matches("\"before\"").count(), 1);
    assert_eq!(log.dropped(), 0);
}

#[test]
fn a_file_that_cannot_be_reopened_goes_on_under_its_old_name() {
    let scratch = Scratch::new("gone");
    let (dir, moved) = (scratch.0.join("logs"), scratch.0.join("moved"));
    std::fs::create_dir(&dir).unwrap();
    let log = AccessLog::open(&AccessSink::File(dir.join("access.log"))).unwrap();
    std::fs::rename(&dir, &moved).unwrap();
    log.reopen();
    log.write(&line("kept"));
    assert!(log.close(PATIENCE));
    assert!(std::fs::read_to_string(moved.join("access.log")).unwrap().contains("kept"));
}

#[test]
fn an_old_file_is_appended_to_and_a_place_that_does_not_exist_is_an_error() {
    let scratch = Scratch::new("append");
    let path = scratch.0.join("access.log");
    std::fs::write(&path, "first\n").unwrap();
    let log = AccessLog::open(&AccessSink::File(path.clone())).unwrap();
    log.write(&line("second"));
    assert!(log.close(PATIENCE));
    assert!(std::fs::read_to_string(&path).unwrap().starts_with("first\n{"));
    assert!(AccessLog::open(&AccessSink::File(scratch.0.join("no/such/dir.log"))).is_err());
}

#[test]
fn the_log_can_be_off_and_is_written_in_the_configuration_as_one_word_or_a_file() {
    let log = AccessLog::open(&serde_json::from_str("\"off\"").unwrap()).unwrap();
    log.write(&line("nowhere"));
    log.reopen();
    assert!(log.close(Duration::ZERO));
    assert_eq!(log.dropped(), 0);
    let file: AccessSink = serde_json::from_str(r#"{"file":"/var/log/tollgate/access.log"}"#).unwrap();
    assert_eq!(file, AccessSink::File("/var/log/tollgate/access.log".into()));
    assert!(serde_json::from_str::<AccessSink>("\"syslog\"").is_err());
}

/// A disk that is full in the middle of a line, and later has room again.
struct FullOnce {
    room: usize,
    full: bool,
    written: Arc<Mutex<Vec<u8>>>,
}

impl Write for FullOnce {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.room == 0 && !self.full {
            self.full = true;
            return Err(io::ErrorKind::StorageFull.into());
        }
        let taken = if self.full { bytes.len() } else { bytes.len().min(self.room) };
        self.room -= taken.min(self.room);
        self.written.lock().extend_from_slice(&bytes[..taken]);
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_line_that_was_cut_by_a_full_disk_does_not_spoil_the_next_one() {
    let written = Arc::new(Mutex::new(Vec::new()));
    let disk = FullOnce { room: 10, full: false, written: Arc::clone(&written) };
    let log = AccessLog::start(Out::Stream(Box::new(disk)), WAITING_BYTES).unwrap();
    log.write(&line("cut"));
    let patience = std::time::Instant::now() + PATIENCE;
    while log.dropped() == 0 {
        assert!(std::time::Instant::now() < patience, "the cut line was not counted");
        thread::yield_now();
    }
    log.write(&line("whole"));
    assert!(log.close(PATIENCE));
    let text = String::from_utf8(written.lock().clone()).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!((lines.len(), lines[0].len(), log.dropped()), (2, 10, 1));
    assert!(lines[1].contains("\"whole\"") && serde_json::from_str::<serde_json::Value>(lines[1]).is_ok());
}
