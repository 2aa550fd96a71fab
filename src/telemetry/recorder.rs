//! A recorder that exports the program's metrics as OpenTelemetry instruments with the same names.
//!
//! Counters and gauges are kept here and read at each export, as the Prometheus exporter does; a histogram is an
//! OpenTelemetry instrument itself.

use std::collections::HashSet;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use metrics::{Counter, Gauge, Histogram, HistogramFn, Key, KeyName, Metadata, Recorder, SharedString, Unit};
use metrics_util::registry::{Registry, Storage};
use opentelemetry::KeyValue;
use opentelemetry::metrics::{Meter, MeterProvider};
use opentelemetry_sdk::metrics::SdkMeterProvider;

use super::SERVICE;

/// Upper bounds of the buckets of durations, in seconds.
pub const LATENCIES: [f64; 10] = [0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0, 60.0];

/// Records metrics and exports them.
pub struct OtelRecorder(Arc<Shared>);

struct Shared {
    registry: Registry<Key, InstrumentStorage>,
    meter: Meter,
    /// Names that have an instrument.
    registered: Mutex<HashSet<String>>,
}

impl fmt::Debug for OtelRecorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OtelRecorder")
    }
}

impl OtelRecorder {
    pub(super) fn new(provider: &SdkMeterProvider) -> Self {
        let meter = provider.meter(SERVICE);
        let registry = Registry::new(InstrumentStorage(meter.clone()));
        Self(Arc::new(Shared { registry, meter, registered: Mutex::default() }))
    }

    /// Whether the name has no instrument yet; then it counts as having one.
    fn is_new(&self, key: &Key) -> bool {
        let mut registered = self.0.registered.lock().unwrap_or_else(PoisonError::into_inner);
        !registered.contains(key.name()) && registered.insert(key.name().to_owned())
    }
}

impl Recorder for OtelRecorder {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        if self.is_new(key) {
            let (shared, name) = (Arc::downgrade(&self.0), key.name().to_owned());
            let counter = self.0.meter.u64_observable_counter(name.clone()).with_callback(move |observer| {
                let Some(shared) = shared.upgrade() else { return };
                shared.registry.visit_counters(|key, value| {
                    if key.name() == name {
                        observer.observe(value.load(Ordering::Relaxed), &attributes(key));
                    }
                });
            });
            counter.build();
        }
        self.0.registry.get_or_create_counter(key, |counter| Counter::from_arc(counter.clone()))
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        if self.is_new(key) {
            let (shared, name) = (Arc::downgrade(&self.0), key.name().to_owned());
            let gauge = self.0.meter.f64_observable_gauge(name.clone()).with_callback(move |observer| {
                let Some(shared) = shared.upgrade() else { return };
                shared.registry.visit_gauges(|key, value| {
                    if key.name() == name {
                        observer.observe(f64::from_bits(value.load(Ordering::Relaxed)), &attributes(key));
                    }
                });
            });
            gauge.build();
        }
        self.0.registry.get_or_create_gauge(key, |gauge| Gauge::from_arc(gauge.clone()))
    }

    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        self.0.registry.get_or_create_histogram(key, |histogram| Histogram::from_arc(histogram.clone()))
    }
}

/// Creates the storage of each metric.
struct InstrumentStorage(Meter);

impl Storage<Key> for InstrumentStorage {
    type Counter = Arc<AtomicU64>;
    type Gauge = Arc<AtomicU64>;
    type Histogram = Arc<OtelHistogram>;

    fn counter(&self, _: &Key) -> Self::Counter {
        Arc::default()
    }

    fn gauge(&self, _: &Key) -> Self::Gauge {
        Arc::default()
    }

    fn histogram(&self, key: &Key) -> Self::Histogram {
        let instrument =
            self.0.f64_histogram(key.name().to_owned()).with_boundaries(LATENCIES.to_vec()).build();
        Arc::new(OtelHistogram { instrument, attributes: attributes(key) })
    }
}

struct OtelHistogram {
    instrument: opentelemetry::metrics::Histogram<f64>,
    attributes: Vec<KeyValue>,
}

impl HistogramFn for OtelHistogram {
    fn record(&self, value: f64) {
        self.instrument.record(value, &self.attributes);
    }
}

fn attributes(key: &Key) -> Vec<KeyValue> {
    key.labels().map(|label| KeyValue::new(label.key().to_owned(), label.value().to_owned())).collect()
}
