//! A family of series under one metric name, keyed by label values.
//!
//! The `prometheus` crate has vectors of its own, but they key a series by a hash of the label values run together, so that
//! `route="a", model="bc"` and `route="ab", model="c"` share one counter. Names come from the user's configuration: such a
//! pair is no rarity. Here the values are compared one by one, and looking an existing series up allocates nothing.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;

use parking_lot::RwLock;
use prometheus::core::{Collector, Desc, Metric};
use prometheus::proto::{LabelPair, MetricFamily, MetricType};
use prometheus::{Counter, Gauge, Histogram, HistogramOpts, IntCounter, IntGauge, Opts};
use smallvec::SmallVec;

/// One row of a [`Table`]: its label values and what they stand for.
type Row<T> = (Box<[Box<str>]>, T);

/// A concurrent map from a few strings to `T`, read without allocation.
pub(crate) struct Table<T> {
    hasher: RandomState,
    // Two rows meet under one hash about never; the inner list keeps them apart should it happen.
    rows: RwLock<HashMap<u64, SmallVec<[Row<T>; 1]>>>,
}

impl<T: Clone> Table<T> {
    pub(crate) fn new() -> Self {
        Self { hasher: RandomState::new(), rows: RwLock::new(HashMap::new()) }
    }

    /// The row of these values, if there is one.
    pub(crate) fn find(&self, values: &[&str]) -> Option<T> {
        let hash = self.hasher.hash_one(values);
        let rows = self.rows.read();
        rows.get(&hash)?.iter().find(|(labels, _)| same(labels, values)).map(|(_, value)| value.clone())
    }

    /// The row of these values, made if it is not there yet.
    pub(crate) fn find_or(&self, values: &[&str], make: impl FnOnce() -> T) -> T {
        if let Some(found) = self.find(values) {
            return found;
        }
        let hash = self.hasher.hash_one(values);
        let mut rows = self.rows.write();
        let slot = rows.entry(hash).or_default();
        if let Some((_, found)) = slot.iter().find(|(labels, _)| same(labels, values)) {
            return found.clone();
        }
        let made = make();
        slot.push((values.iter().map(|&value| value.into()).collect(), made.clone()));
        made
    }

    /// Keeps only the rows whose values satisfy `keep`.
    pub(crate) fn retain(&self, keep: impl Fn(&[Box<str>]) -> bool) {
        self.rows.write().retain(|_, slot| {
            slot.retain(|(labels, _)| keep(labels));
            !slot.is_empty()
        });
    }

    /// How many rows there are.
    pub(crate) fn len(&self) -> usize {
        self.rows.read().values().map(SmallVec::len).sum()
    }

    fn each(&self, mut visit: impl FnMut(&[Box<str>], &T)) {
        for (labels, value) in self.rows.read().values().flatten() {
            visit(labels, value);
        }
    }
}

fn same(labels: &[Box<str>], values: &[&str]) -> bool {
    labels.len() == values.len() && labels.iter().zip(values).all(|(label, value)| **label == **value)
}

/// A kind of series that a [`Family`] can hold.
pub(crate) trait Series: Metric + 'static {
    /// Its TYPE in the exposition.
    const TYPE: MetricType;
    /// A fresh series at zero. `buckets` (seconds) concerns histograms only.
    fn fresh(name: &str, help: &str, buckets: &[f64]) -> prometheus::Result<Self>;
}

macro_rules! plain_series {
    ($($kind:ty = $type:ident),*) => {$(
        impl Series for $kind {
            const TYPE: MetricType = MetricType::$type;
            fn fresh(name: &str, help: &str, _: &[f64]) -> prometheus::Result<Self> {
                Self::with_opts(Opts::new(name, help))
            }
        }
    )*};
}
plain_series!(IntCounter = COUNTER, Counter = COUNTER, IntGauge = GAUGE, Gauge = GAUGE);

impl Series for Histogram {
    const TYPE: MetricType = MetricType::HISTOGRAM;
    fn fresh(name: &str, help: &str, buckets: &[f64]) -> prometheus::Result<Self> {
        Self::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec()))
    }
}

/// All series of one metric.
pub(crate) struct Family<S> {
    name: &'static str,
    help: &'static str,
    labels: &'static [&'static str],
    buckets: &'static [f64],
    desc: Desc,
    // Handed out where a series cannot be built. Name, help and buckets are proven by building this one, so that never happens;
    // but a metric is no reason to fail a request.
    spare: S,
    table: Table<S>,
}

impl<S: Series> Family<S> {
    /// A family without series yet; one without labels has its only series at once.
    ///
    /// # Errors
    /// The name, a label or the buckets are not what Prometheus allows.
    pub(crate) fn new(
        name: &'static str,
        help: &'static str,
        labels: &'static [&'static str],
        buckets: &'static [f64],
    ) -> prometheus::Result<Self> {
        let names = labels.iter().map(|&label| label.to_owned()).collect();
        let desc = Desc::new(name.to_owned(), help.to_owned(), names, HashMap::new())?;
        let spare = S::fresh(name, help, buckets)?;
        let family = Self { name, help, labels, buckets, desc, spare, table: Table::new() };
        if labels.is_empty() {
            family.with(&[]);
        }
        Ok(family)
    }

    /// The series with these label values, in the order of the family's labels.
    pub(crate) fn with(&self, values: &[&str]) -> S {
        debug_assert_eq!(values.len(), self.labels.len(), "{}", self.name);
        self.table
            .find_or(values, || S::fresh(self.name, self.help, self.buckets).unwrap_or_else(|_| self.spare.clone()))
    }

    /// Drops the series whose label values do not satisfy `keep`.
    pub(crate) fn retain(&self, keep: impl Fn(&[Box<str>]) -> bool) {
        self.table.retain(keep);
    }
}

/// A family as the registry holds it.
pub(crate) struct Registered<S>(pub(crate) std::sync::Arc<Family<S>>);

impl<S: Series> Collector for Registered<S> {
    fn desc(&self) -> Vec<&Desc> {
        vec![&self.0.desc]
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let mut metrics = Vec::with_capacity(self.0.table.len());
        self.0.table.each(|values, series| {
            let mut metric = series.metric();
            metric.set_label(self.0.labels.iter().zip(values).map(|(name, value)| pair(name, value)).collect());
            metrics.push(metric);
        });
        let mut family = MetricFamily::default();
        family.set_name(self.0.name.to_owned());
        family.set_help(self.0.help.to_owned());
        family.set_field_type(S::TYPE);
        family.set_metric(metrics);
        vec![family]
    }
}

fn pair(name: &str, value: &str) -> LabelPair {
    let mut pair = LabelPair::default();
    pair.set_name(name.to_owned());
    pair.set_value(value.to_owned());
    pair
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn label_values_that_run_together_alike_are_different_series() {
        let family = Family::<IntCounter>::new("t_total", "Test.", &["route", "model"], &[]).unwrap();
        family.with(&["a", "bc"]).inc();
        family.with(&["ab", "c"]).inc_by(5);
        assert_eq!((family.with(&["a", "bc"]).get(), family.with(&["ab", "c"]).get()), (1, 5));
    }

    #[test]
    fn a_series_is_made_once_and_forgotten_on_request() {
        let family = Family::<IntGauge>::new("t", "Test.", &["node"], &[]).unwrap();
        family.with(&["a"]).set(3);
        family.with(&["b"]).set(4);
        assert_eq!(family.with(&["a"]).get(), 3);
        family.retain(|values| values.first().is_some_and(|node| &**node == "b"));
        assert_eq!(family.table.len(), 1);
        assert_eq!(family.with(&["b"]).get(), 4);
    }

    #[test]
    fn a_family_without_labels_shows_a_zero_from_the_start() {
        let family = Family::<IntGauge>::new("t", "Test.", &[], &[]).unwrap();
        let collected = Registered(std::sync::Arc::new(family)).collect();
        assert_eq!(collected[0].get_metric().len(), 1);
    }

    #[test]
    fn many_threads_that_ask_for_one_series_share_it() {
        let family = Family::<IntCounter>::new("t_total", "Test.", &["key"], &[]).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for n in 0..400 {
                        family.with(&[&(n % 20).to_string()]).inc();
                    }
                });
            }
        });
        assert_eq!(family.table.len(), 20);
        assert!((0..20).all(|n| family.with(&[&n.to_string()]).get() == 80));
    }
}
