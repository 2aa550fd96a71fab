//! OpenTelemetry traces and metrics, pushed by OTLP over HTTP to a collector where OpenTelemetry's own variables
//! (`OTEL_*`) ask for it. Without a collector everything here still works, and costs next to nothing.
//!
//! Spans are those of the log: `request`, `job` and the job's phases. A request's span continues the trace in its
//! `traceparent` header; its own context is stored in the job's row, so that the worker's spans belong to the same
//! trace. Metrics are those of `/metrics`, with the same names.

mod export;
mod recorder;

use std::sync::mpsc::channel;
use std::time::Duration;

use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::{Status, TraceContextExt, TracerProvider};
use opentelemetry::{Context, KeyValue};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::metrics::SdkMeterProvider;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing::{Level, Metadata, Span, Subscriber};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::FilterFn;
use tracing_subscriber::registry::LookupSpan;

use crate::config::Signals;
pub use recorder::{LATENCIES, OtelRecorder};

/// How long the process waits at its end for the collector to take what is left.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

const SERVICE: &str = "hypnos";

/// Name of a span that is not exported: it lasts as long as the process.
const PROCESS_SPAN: &str = "worker";

/// The exporters. End it with [`Telemetry::flush`]; dropped, it loses what was not sent yet.
#[derive(Debug)]
pub struct Telemetry {
    traces: Option<SdkTracerProvider>,
    metrics: Option<SdkMeterProvider>,
}

impl Telemetry {
    /// Starts to export `signals`; none if none are requested. `role` is the part of the service that this process is.
    /// The error is an invalid setting, in one line.
    pub fn start(signals: Signals, role: &'static str) -> Result<Option<Self>, String> {
        if signals == Signals::default() {
            return Ok(None);
        }
        let (client, resource) = (export::client()?, resource(role));
        let traces =
            signals.traces.then(|| export::tracer_provider(client.clone(), resource.clone())).transpose()?;
        let metrics = signals.metrics.then(|| export::meter_provider(client, resource)).transpose()?;
        Ok(Some(Self { traces, metrics }))
    }

    /// The layer that exports spans.
    pub fn layer<S>(&self) -> Option<impl Layer<S> + use<S>>
    where
        S: Subscriber + for<'span> LookupSpan<'span>,
    {
        let tracer = self.traces.as_ref()?.tracer(SERVICE);
        let layer = tracing_opentelemetry::layer()
            .with_tracer(tracer)
            .with_location(false)
            .with_threads(false)
            .with_tracked_inactivity(false);
        Some(layer.with_filter(FilterFn::new(is_ours)))
    }

    /// The recorder that exports metrics.
    pub fn recorder(&self) -> Option<OtelRecorder> {
        self.metrics.as_ref().map(OtelRecorder::new)
    }

    /// Sends what is left and stops, within five seconds, whatever the collector does.
    pub fn flush(mut self) {
        let (done, ended) = channel();
        let (traces, metrics) = (self.traces.take(), self.metrics.take());
        let n_senders = usize::from(traces.is_some()) + usize::from(metrics.is_some());
        let also_done = done.clone();
        // Each on a thread of its own, which ends with the process.
        if let Some(traces) = traces {
            std::thread::spawn(move || {
                let _ = traces.shutdown_with_timeout(FLUSH_TIMEOUT); // the exporter has logged its error
                let _ = done.send(());
            });
        }
        if let Some(metrics) = metrics {
            std::thread::spawn(move || {
                let _ = metrics.shutdown_with_timeout(FLUSH_TIMEOUT);
                let _ = also_done.send(());
            });
        }
        let deadline = std::time::Instant::now() + FLUSH_TIMEOUT;
        for _ in 0..n_senders {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            if ended.recv_timeout(left).is_err() {
                return;
            }
        }
    }
}

impl Drop for Telemetry {
    /// Leaks the exporters: their own destructors would flush without a time limit.
    fn drop(&mut self) {
        std::mem::forget((self.traces.take(), self.metrics.take()));
    }
}

/// Whether a span or event is ours and at least of level info.
fn is_ours(metadata: &Metadata<'_>) -> bool {
    let ours = metadata.target() == "hypnos" || metadata.target().starts_with("hypnos::");
    ours && *metadata.level() <= Level::INFO && metadata.name() != PROCESS_SPAN
}

/// The resource: from `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES`, completed with version, instance and role.
fn resource(role: &'static str) -> Resource {
    let own = [
        KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
        KeyValue::new("service.instance.id", uuid::Uuid::now_v7().to_string()),
        KeyValue::new("hypnos.role", role),
    ];
    let given = Resource::builder().build();
    let is_named = |name: &opentelemetry::Value| !name.as_str().starts_with("unknown_service");
    let named = given.get(&"service.name".into()).is_some_and(|name| is_named(&name));
    let resource = Resource::builder_empty().with_attributes(own);
    let given = given.iter().map(|(key, value)| KeyValue::new(key.clone(), value.clone()));
    let resource = resource.with_attributes(given);
    if named { resource.build() } else { resource.with_service_name(SERVICE).build() }
}

/// Makes a new span a child of the span in a W3C `traceparent`; without one it begins a trace of its own.
pub fn set_parent(span: &Span, traceparent: Option<&str>) {
    let parent = traceparent.map(|text| {
        TraceContextPropagator::new().extract_with_context(&Context::new(), &TraceparentHeader(text))
    });
    let _ = span.set_parent(parent.unwrap_or_default()); // fails if spans are not exported
}

/// The W3C `traceparent` of a span, for its children elsewhere; none if spans are not exported.
pub fn traceparent(span: &Span) -> Option<String> {
    let context = span.context();
    let own = context.span().span_context().clone();
    own.is_valid()
        .then(|| format!("00-{}-{}-{:02x}", own.trace_id(), own.span_id(), own.trace_flags().to_u8()))
}

/// Records the status of a request's response.
pub fn record_status(span: &Span, status: u16) {
    span.set_attribute("http.response.status_code", i64::from(status));
    if status >= 500 {
        span.set_status(Status::error(""));
    }
}

/// Records that the span failed, with the kind of fault.
pub fn record_error(span: &Span, code: &'static str) {
    span.set_attribute("error.type", code);
    span.set_status(Status::error(code));
}

/// A carrier with one header, `traceparent`.
struct TraceparentHeader<'a>(&'a str);

impl Extractor for TraceparentHeader<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        (key == "traceparent").then_some(self.0)
    }

    fn keys(&self) -> Vec<&str> {
        vec!["traceparent"]
    }
}
