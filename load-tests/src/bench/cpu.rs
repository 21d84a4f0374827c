//! CPU time of another process, from `/proc`.

use std::collections::HashMap;
use std::fs;
use std::time::Duration;

/// CPU time by thread, so that threads that ended between two looks are the only thing missed.
#[derive(Clone, Debug, Default)]
pub(super) struct CpuTime {
    threads: HashMap<u32, Duration>,
}

/// What the times are read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// Nanoseconds from the scheduler, per thread.
    SchedStat,
    /// Ticks of 10 ms, of the whole process.
    Stat,
}

impl Source {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::SchedStat => "/proc/PID/task/*/schedstat (ns)",
            Self::Stat => "/proc/PID/stat utime+stime (10 ms ticks)",
        }
    }

    /// The finer one that this kernel has.
    pub(super) fn best(pid: u32) -> Self {
        let fine = CpuTime::look(pid, Self::SchedStat).is_some_and(|time| time.total() > Duration::ZERO);
        if fine { Self::SchedStat } else { Self::Stat }
    }
}

impl CpuTime {
    pub(super) fn look(pid: u32, source: Source) -> Option<Self> {
        let threads = match source {
            Source::Stat => HashMap::from([(pid, ticks(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)?)]),
            Source::SchedStat => fs::read_dir(format!("/proc/{pid}/task"))
                .ok()?
                .flatten()
                .filter_map(|entry| {
                    let thread = entry.file_name().to_str()?.parse().ok()?;
                    let text = fs::read_to_string(entry.path().join("schedstat")).ok()?;
                    Some((thread, Duration::from_nanos(text.split(' ').next()?.parse().ok()?)))
                })
                .collect(),
        };
        Some(Self { threads })
    }

    fn total(&self) -> Duration {
        self.threads.values().sum()
    }

    /// Time used since an earlier look.
    pub(super) fn since(&self, before: &Self) -> Duration {
        self.threads
            .iter()
            .map(|(thread, time)| time.saturating_sub(before.threads.get(thread).copied().unwrap_or_default()))
            .sum()
    }
}

// utime and stime are fields 14 and 15; the name in field 2 may hold blanks and brackets. Linux shows them to
// programs in hundredths of a second on every machine.
fn ticks(stat: &str) -> Option<Duration> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut fields = after_name.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(Duration::from_millis((user + system) * 10))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_and_system_ticks_are_found_behind_any_name() {
        let stat = "7 (a ) b) S 1 7 7 0 -1 4194560 100 0 0 0 25 17 0 0 20 0 1 0 5 1 1";
        assert_eq!(ticks(stat), Some(Duration::from_millis(420)));
        assert_eq!(ticks("nonsense"), None);
    }

    #[test]
    fn work_done_is_seen() {
        let pid = std::process::id();
        let source = Source::best(pid);
        let before = CpuTime::look(pid, source).unwrap();
        let start = std::time::Instant::now();
        let mut sum = 0u64;
        while CpuTime::look(pid, source).unwrap().since(&before) < Duration::from_millis(20) {
            (0..100_000u64).for_each(|n| sum = sum.wrapping_mul(31).wrapping_add(std::hint::black_box(n)));
            assert!(start.elapsed() < Duration::from_secs(20), "no CPU time seen; {sum}");
        }
    }
}
