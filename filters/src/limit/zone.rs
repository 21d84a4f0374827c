//! Zones: where a calendar day begins, also where the clocks are changed in summer.

use std::collections::BTreeMap;
use std::fmt;

use jiff::Timestamp;
use jiff::tz::TimeZoneDatabase;
use parking_lot::Mutex;

/// Changes are known up to the year 2200; after it, the offset of then stays.
const HORIZON: i64 = 7_258_118_400;

/// Where a calendar day begins.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Zone {
    /// So many seconds east of UTC, always.
    Fixed(i32),
    /// A zone of the tz database, which is part of the program.
    Named(&'static Named),
}

/// A zone with a name, made once for the whole process.
#[derive(PartialEq, Eq)]
pub struct Named {
    name: Box<str>,
    /// Seconds east of UTC before the first change.
    first: i32,
    changes: Box<[Change]>,
}

/// From this second on, so many seconds east of UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) at: i64,
    pub(super) offset: i32,
}

impl Default for Zone {
    fn default() -> Self {
        Self::UTC
    }
}

impl fmt::Debug for Zone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(offset) => write!(f, "Fixed({offset})"),
            Self::Named(named) => write!(f, "Named({})", named.name),
        }
    }
}

/// As it is written in a configuration: `Europe/Berlin`, `+08:00`, `UTC`.
impl fmt::Display for Zone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(0) => f.write_str("UTC"),
            Self::Fixed(offset) => {
                let (sign, minutes) = (if *offset < 0 { '-' } else { '+' }, offset.unsigned_abs() / 60);
                write!(f, "{sign}{:02}:{:02}", minutes / 60, minutes % 60)
            }
            Self::Named(named) => f.write_str(&named.name),
        }
    }
}

impl Zone {
    /// Days and months of UTC, the default.
    pub const UTC: Self = Self::Fixed(0);

    /// The zone of that name in the tz database, like `Europe/Berlin`; `None` if there is none.
    pub fn named(name: &str) -> Option<Self> {
        // There are some 600 zones, and each is kept for good once it was asked for.
        static KNOWN: Mutex<BTreeMap<&'static str, &'static Named>> = Mutex::new(BTreeMap::new());
        let mut known = KNOWN.lock();
        if let Some(named) = known.get(name) {
            return Some(Self::Named(named));
        }
        let named: &'static Named = Box::leak(Box::new(Named::read(name)?));
        known.insert(&named.name, named);
        Some(Self::Named(named))
    }

    /// All names that [`Zone::named`] knows.
    pub fn names() -> Vec<String> {
        TimeZoneDatabase::bundled().available().map(|name| name.to_string()).collect()
    }

    /// Seconds east of UTC at that second since the epoch, and the changes after it.
    pub(super) fn from(self, at: i64) -> (i32, &'static [Change]) {
        match self {
            Self::Fixed(offset) => (offset, &[]),
            Self::Named(named) => {
                let past = named.changes.partition_point(|change| change.at <= at);
                let (before, after) = named.changes.split_at_checked(past).unwrap_or_default();
                (before.last().map_or(named.first, |change| change.offset), after)
            }
        }
    }
}

impl Named {
    fn read(name: &str) -> Option<Self> {
        let zone = TimeZoneDatabase::bundled().get(name).ok()?;
        // The database does not mind the case of a name; a configuration does.
        zone.iana_name().filter(|known| *known == name)?;
        let epoch = Timestamp::UNIX_EPOCH;
        let changes = zone
            .following(epoch)
            .map(|change| Change { at: change.timestamp().as_second(), offset: change.offset().seconds() });
        Some(Self {
            name: name.into(),
            first: zone.to_offset(epoch).seconds(),
            changes: changes.take_while(|change| change.at < HORIZON).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secs(text: &str) -> i64 {
        text.parse::<Timestamp>().unwrap().as_second()
    }

    #[test]
    fn a_zone_is_known_by_its_very_name_and_made_once() {
        let berlin = Zone::named("Europe/Berlin").unwrap();
        assert_eq!(berlin, Zone::named("Europe/Berlin").unwrap());
        assert_ne!(berlin, Zone::named("Europe/Paris").unwrap());
        for unknown in ["", "Berlin", "Europe/Berlim", "europe/berlin", "/etc/passwd", "../UTC"] {
            assert_eq!(Zone::named(unknown), None, "{unknown}");
        }
        let names = Zone::names();
        assert!(names.len() > 400 && names.iter().any(|name| name == "Asia/Kolkata"), "{}", names.len());
        assert!(names.iter().all(|name| Zone::named(name).is_some()));
    }

    #[test]
    fn the_offset_is_that_of_the_moment() {
        let berlin = Zone::named("Europe/Berlin").unwrap();
        let change = secs("2026-03-29T01:00:00Z");
        assert_eq!((berlin.from(change - 1).0, berlin.from(change).0), (3_600, 7_200));
        let (_, after) = berlin.from(change);
        assert_eq!(after[0], Change { at: secs("2026-10-25T01:00:00Z"), offset: 3_600 });
        // Long before and long after.
        assert_eq!(berlin.from(0).0, 3_600);
        assert_eq!(berlin.from(secs("2199-07-01T00:00:00Z")).0, 7_200);
        assert_eq!(Zone::Fixed(-3_600).from(change), (-3_600, &[][..]));
        let written = [berlin, Zone::UTC, Zone::Fixed(28_800), Zone::Fixed(-19_800)].map(|zone| zone.to_string());
        assert_eq!(written, ["Europe/Berlin", "UTC", "+08:00", "-05:30"]);
    }
}
