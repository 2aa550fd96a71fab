//! Traces and figures by OpenTelemetry, pushed by OTLP over HTTP to whoever collects them, where OpenTelemetry's own
//! variables (`OTEL_*`) ask for it. Everything here works without a collector, and then costs next to nothing.
//!
//! Spans are the log's own: `request`, `job` and the job's phases. A request's span continues the trace that its caller
//! names in `traceparent`; its own context goes into the job's row, so that the worker's spans belong to the same trace.
//! Figures are those of `/metrics`, by the same names.

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

/// How long the end of the process waits for a collector to take what is left.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

const SERVICE: &str = "hypnos";

/// A span of the log that is none of a trace: it lasts as long as the process.
const PROCESS_SPAN: &str = "worker";

/// What is sent, and its senders. Ends with [`Telemetry::flush`]; dropped, it loses what was not sent yet.
#[derive(Debug)]
pub struct Telemetry {
    traces: Option<SdkTracerProvider>,
    metrics: Option<SdkMeterProvider>,
}

impl Telemetry {
    /// Begins to send `signals`; none where nothing is asked for. `role` says which part of the service this process is.
    /// The error is a setting that cannot work, in one line.
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

    /// What hears the log's spans.
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

    /// What hears the figures.
    pub fn recorder(&self) -> Option<OtelRecorder> {
        self.metrics.as_ref().map(OtelRecorder::new)
    }

    /// Sends what is left and ends, within five seconds, whatever the collector does.
    pub fn flush(mut self) {
        let (done, ended) = channel();
        let (traces, metrics) = (self.traces.take(), self.metrics.take());
        let n_senders = usize::from(traces.is_some()) + usize::from(metrics.is_some());
        let also_done = done.clone();
        // Each on a thread of its own, which the end of the process takes with it.
        if let Some(traces) = traces {
            std::thread::spawn(move || {
                let _ = traces.shutdown_with_timeout(FLUSH_TIMEOUT); // the sender has said what was wrong
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
    /// The senders' own way to be dropped is to flush for as long as it takes.
    fn drop(&mut self) {
        std::mem::forget((self.traces.take(), self.metrics.take()));
    }
}

/// Our own spans and what is logged within them, at the level of the log's default.
fn is_ours(metadata: &Metadata<'_>) -> bool {
    let ours = metadata.target() == "hypnos" || metadata.target().starts_with("hypnos::");
    ours && *metadata.level() <= Level::INFO && metadata.name() != PROCESS_SPAN
}

/// Who sends: what `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` say, and what nobody has to say.
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

/// Makes a span that has just begun part of the trace that a W3C `traceparent` names, or the first of a trace of its own.
pub fn set_parent(span: &Span, traceparent: Option<&str>) {
    let parent = traceparent.map(|text| {
        TraceContextPropagator::new().extract_with_context(&Context::new(), &TraceparentHeader(text))
    });
    let _ = span.set_parent(parent.unwrap_or_default()); // refused where nobody hears spans
}

/// The W3C `traceparent` that makes others' spans part of this one's trace; none where nobody hears spans.
pub fn traceparent(span: &Span) -> Option<String> {
    let context = span.context();
    let own = context.span().span_context().clone();
    own.is_valid()
        .then(|| format!("00-{}-{}-{:02x}", own.trace_id(), own.span_id(), own.trace_flags().to_u8()))
}

/// Says how a request was answered.
pub fn record_status(span: &Span, status: u16) {
    span.set_attribute("http.response.status_code", i64::from(status));
    if status >= 500 {
        span.set_status(Status::error(""));
    }
}

/// Says that what the span covers failed, and by which kind of fault.
pub fn record_error(span: &Span, code: &'static str) {
    span.set_attribute("error.type", code);
    span.set_status(Status::error(code));
}

/// A `traceparent` as a carrier of headers.
struct TraceparentHeader<'a>(&'a str);

impl Extractor for TraceparentHeader<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        (key == "traceparent").then_some(self.0)
    }

    fn keys(&self) -> Vec<&str> {
        vec!["traceparent"]
    }
}
