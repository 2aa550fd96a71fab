//! Export to the collector: OTLP as protobuf over HTTP, with the HTTP client and TLS of the rest of the program.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::trace::SpanKind;
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{MetricExporter, Protocol, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::metrics::SdkMeterProvider;
use opentelemetry_sdk::trace::{SdkTracerProvider, SpanData};
use tracing::{info, warn};

/// Timeout of one request; `OTEL_EXPORTER_OTLP_TIMEOUT` limits it together with its retries.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Attributes that are exported, with the names that they are exported by. No others are.
const ATTRIBUTES: [(&str, &str); 10] = [
    ("method", "http.request.method"),
    ("route", "http.route"),
    ("http.response.status_code", "http.response.status_code"),
    ("request.id", "hypnos.request.id"),
    ("job", "hypnos.job.id"),
    ("kind", "hypnos.job.kind"),
    ("attempt", "hypnos.job.attempt"),
    ("phase", "hypnos.job.phase"),
    ("device", "hypnos.device"),
    ("error.type", "error.type"),
];

pub(super) fn client() -> Result<Arc<dyn HttpClient>, String> {
    // Fails if the same provider is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = reqwest::blocking::Client::builder()
        .timeout(REQUEST_TIMEOUT)
        .connect_timeout(CONNECT_TIMEOUT)
        .build();
    let client = client
        .map_err(|error| format!("cannot create an HTTP client for OpenTelemetry's collector: {error}"))?;
    Ok(Arc::new(Client { client, is_unreachable: AtomicBool::new(false) }))
}

pub(super) fn tracer_provider(
    client: Arc<dyn HttpClient>,
    resource: Resource,
) -> Result<SdkTracerProvider, String> {
    let exporter = SpanExporter::builder().with_http().with_protocol(Protocol::HttpBinary);
    let exporter = exporter.with_shared_http_client(client).build().map_err(|error| setting_error(&error))?;
    Ok(SdkTracerProvider::builder()
        .with_batch_exporter(ConventionalNames(exporter))
        .with_resource(resource)
        .build())
}

pub(super) fn meter_provider(
    client: Arc<dyn HttpClient>,
    resource: Resource,
) -> Result<SdkMeterProvider, String> {
    let exporter = MetricExporter::builder().with_http().with_protocol(Protocol::HttpBinary);
    let exporter = exporter.with_shared_http_client(client).build().map_err(|error| setting_error(&error))?;
    Ok(SdkMeterProvider::builder().with_periodic_exporter(exporter).with_resource(resource).build())
}

fn setting_error(error: &dyn fmt::Display) -> String {
    format!("OpenTelemetry's settings (OTEL_*) are invalid: {error}")
}

/// Sends requests from the exporters' own threads. Logs once that the collector is unreachable, and once that it is
/// back.
#[derive(Debug)]
struct Client {
    client: reqwest::blocking::Client,
    is_unreachable: AtomicBool,
}

#[async_trait::async_trait]
impl HttpClient for Client {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let sent = self.send(request);
        let failure = match &sent {
            Ok(response) if response.status().is_success() => None,
            Ok(response) => Some(format!("it responds with {}", response.status())),
            Err(error) if error.is_timeout() => Some("it does not respond in time".to_owned()),
            Err(error) if error.is_connect() => Some("no connection".to_owned()),
            Err(_) => Some("the request could not be sent".to_owned()), // the error has its URL, which may hold a key
        };
        match failure {
            Some(why) if !self.is_unreachable.swap(true, Ordering::Relaxed) => {
                warn!(
                    "OpenTelemetry's collector cannot be reached: {why} (logged once; nothing else is affected)"
                );
            }
            None if self.is_unreachable.swap(false, Ordering::Relaxed) => {
                info!("OpenTelemetry's collector can be reached again");
            }
            _ => {}
        }
        Ok(sent?)
    }
}

impl Client {
    fn send(&self, request: Request<Bytes>) -> reqwest::Result<Response<Bytes>> {
        let response = self.client.execute(request.try_into()?)?;
        let (status, headers) = (response.status(), response.headers().clone());
        let mut answer = Response::new(response.bytes()?);
        *answer.status_mut() = status;
        *answer.headers_mut() = headers;
        Ok(answer)
    }
}

/// Renames spans and their attributes by OpenTelemetry's semantic conventions; the log has shorter names.
#[derive(Debug)]
struct ConventionalNames(SpanExporter);

impl opentelemetry_sdk::trace::SpanExporter for ConventionalNames {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        self.0.export(batch.into_iter().map(with_conventional_names).collect()).await
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.0.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.0.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.0.set_resource(resource);
    }
}

fn with_conventional_names(mut span: SpanData) -> SpanData {
    let attribute_text = |key: &str| {
        let found = span.attributes.iter().find(|attribute| attribute.key.as_str() == key);
        found.map(|attribute| attribute.value.as_str().into_owned()).unwrap_or_default()
    };
    match span.name.as_ref() {
        "request" => {
            (span.name, span.span_kind) = (
                format!("{} {}", attribute_text("method"), attribute_text("route")).into(),
                SpanKind::Server,
            );
        }
        "job" => {
            (span.name, span.span_kind) =
                (format!("job {}", attribute_text("kind")).into(), SpanKind::Consumer);
        }
        "phase" => span.name = attribute_text("phase").into(),
        _ => {}
    }
    let attributes = std::mem::take(&mut span.attributes);
    span.attributes = attributes
        .into_iter()
        .filter_map(|KeyValue { key, value, .. }| {
            let (_, name) = ATTRIBUTES.iter().find(|(ours, _)| *ours == key.as_str())?;
            Some(KeyValue::new(*name, value))
        })
        .collect();
    span
}
