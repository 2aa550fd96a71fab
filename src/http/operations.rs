//! Health checks and metrics of a process, for operators.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use super::middleware::with_base_layers;
use super::problem::{Kind, Problem};
use crate::blobs::{self, Blobs};
use crate::health::Health;
use crate::store::{self, Store};

/// The answer of `/healthz`.
pub(super) const ALIVE: &str = "ok\n";
/// How long a probe of the object store is cached, so that health checks do not load it.
const PROBE_TTL: Duration = Duration::from_secs(5);

/// Health checks and metrics of a process, whether or not it serves the API.
pub struct Operations {
    store: Store,
    blobs: Blobs,
    metrics: PrometheusHandle,
    closing: CancellationToken,
    probe: Mutex<Option<(Instant, Result<(), blobs::Error>)>>,
    devices: Health,
    serves_api: bool,
}

impl Operations {
    /// Of a process that serves the API: ready when it can serve and, if it has `devices`, at least one takes jobs. Its
    /// metrics include the queue's.
    pub fn for_server(
        store: Store,
        blobs: Blobs,
        metrics: PrometheusHandle,
        closing: CancellationToken,
        devices: Health,
    ) -> Self {
        Self { store, blobs, metrics, closing, probe: Mutex::default(), devices, serves_api: true }
    }

    /// Of a process that only runs workers: ready when at least one of its `devices` takes jobs. Its metrics lack the
    /// queue's, or a sum over all processes would count them once for every worker.
    pub fn for_worker(
        store: Store,
        blobs: Blobs,
        metrics: PrometheusHandle,
        closing: CancellationToken,
        devices: Health,
    ) -> Self {
        Self { serves_api: false, ..Self::for_server(store, blobs, metrics, closing, devices) }
    }

    /// All routes, without keys, for a listener that only operators reach.
    pub fn router(self: Arc<Self>) -> Router {
        let ready = |State(own): State<Arc<Self>>| async move { own.ready(true).await };
        let metrics = |State(own): State<Arc<Self>>| async move { own.metrics().await };
        let routes = Router::new()
            .route("/healthz", get(|| async { ALIVE }))
            .route("/readyz", get(ready))
            .route("/metrics", get(metrics));
        with_base_layers(routes.with_state(self))
    }

    /// Whether the process is ready. `detailed` adds the condition of each device.
    pub(super) async fn ready(&self, detailed: bool) -> Result<String, Problem> {
        let not_ready = |why: String| Err(Problem::new(Kind::Unavailable, why));
        if self.closing.is_cancelled() {
            return not_ready("the server is about to end".into());
        }
        self.store.ping().await?;
        self.store.check_schema().await?;
        let mut text = String::from("ok\n");
        match self.probe().await {
            Ok(()) => {}
            // Objects can still be read, and deleted, which frees space.
            Err(blobs::Error::Full) if self.serves_api => {
                text = "ok, but the object store is full: uploads are refused\n".into();
            }
            Err(error) => return Err(Problem::unavailable("object store", &error)),
        }
        let lines: Vec<String> = self.devices.devices().iter().map(ToString::to_string).collect();
        if lines.is_empty() && !self.serves_api {
            return not_ready("no device takes jobs: starting".into());
        }
        if !self.devices.is_ready() {
            let details = if detailed { format!(": {}", lines.join("; ")) } else { String::new() };
            return not_ready(format!("no device takes jobs{details}"));
        }
        if detailed {
            lines.iter().for_each(|line| text.extend([line, "\n"]));
        }
        Ok(text)
    }

    /// Probes the object store, or returns the last result if it is recent.
    async fn probe(&self) -> Result<(), blobs::Error> {
        let mut last = self.probe.lock().await; // concurrent callers share one probe
        if let Some((at, answer)) = &*last
            && at.elapsed() < PROBE_TTL
        {
            return answer.clone();
        }
        let answer = self.blobs.probe().await;
        *last = Some((Instant::now(), answer.clone()));
        answer
    }

    pub(super) async fn metrics(&self) -> Result<Response, Problem> {
        if self.serves_api {
            update_queue_metrics(&self.store).await?;
        }
        self.metrics.run_upkeep();
        let text = "text/plain; version=0.0.4; charset=utf-8";
        Ok(([(header::CONTENT_TYPE, text)], self.metrics.render()).into_response())
    }
}

/// Updates the metrics of the queue. `/metrics` does it by itself; a process that pushes metrics has to call it.
pub async fn update_queue_metrics(store: &Store) -> store::Result<()> {
    for gauge in store.gauges().await?.kinds {
        let labels = [("kind", gauge.kind.as_str())];
        metrics::gauge!("hypnos_jobs_queued", &labels).set(gauge.queued as f64);
        metrics::gauge!("hypnos_jobs_running", &labels).set(gauge.running as f64);
        metrics::gauge!("hypnos_jobs_oldest_queued_seconds", &labels)
            .set(gauge.oldest_queued_ms as f64 / 1e3);
    }
    metrics::gauge!("hypnos_jobs_deleting").set(store.n_deleting().await? as f64);
    Ok(())
}
