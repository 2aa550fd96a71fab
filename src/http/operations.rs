//! What operators ask: does the process live, can it serve, how is it doing.

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

/// What `/healthz` answers.
pub(super) const ALIVE: &str = "ok\n";
/// How long an answer of the object store is believed, so that questions do not become load.
const PROBE_TTL: Duration = Duration::from_secs(5);

/// What operators ask of a process, whether or not it answers clients too.
pub struct Operations {
    store: Store,
    blobs: Blobs,
    metrics: PrometheusHandle,
    closing: CancellationToken,
    probe: Mutex<Option<(Instant, Result<(), blobs::Error>)>>,
    devices: Health,
    answers_clients: bool,
}

impl Operations {
    /// Of a process that answers clients: it is ready when it can serve, and one of its `devices` takes jobs, if it has some.
    /// Its figures have the queue's.
    pub fn for_server(
        store: Store,
        blobs: Blobs,
        metrics: PrometheusHandle,
        closing: CancellationToken,
        devices: Health,
    ) -> Self {
        Self { store, blobs, metrics, closing, probe: Mutex::default(), devices, answers_clients: true }
    }

    /// Of a process that only works: it is ready when one of its `devices` takes jobs. The queue's figures are left to the
    /// fronts, or they would be summed once for every worker.
    pub fn for_worker(
        store: Store,
        blobs: Blobs,
        metrics: PrometheusHandle,
        closing: CancellationToken,
        devices: Health,
    ) -> Self {
        Self { answers_clients: false, ..Self::for_server(store, blobs, metrics, closing, devices) }
    }

    /// All of it, without keys, for a listener that only operators reach.
    pub fn router(self: Arc<Self>) -> Router {
        let ready = |State(own): State<Arc<Self>>| async move { own.ready(true).await };
        let metrics = |State(own): State<Arc<Self>>| async move { own.metrics().await };
        let routes = Router::new()
            .route("/healthz", get(|| async { ALIVE }))
            .route("/readyz", get(ready))
            .route("/metrics", get(metrics));
        with_base_layers(routes.with_state(self))
    }

    /// Whether the process can do what it is for. `detailed` tells the condition of each device too.
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
            // What is there can be read and deleted, which is what makes room.
            Err(blobs::Error::Full) if self.answers_clients => {
                text = "ok, but the object store is full: uploads are refused\n".into();
            }
            Err(error) => return Err(Problem::unavailable("object store", &error)),
        }
        let lines: Vec<String> = self.devices.devices().iter().map(ToString::to_string).collect();
        if lines.is_empty() && !self.answers_clients {
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

    /// The object store's answer, or its last one if that is fresh.
    async fn probe(&self) -> Result<(), blobs::Error> {
        let mut last = self.probe.lock().await; // who comes meanwhile hears the same answer
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
        if self.answers_clients {
            update_queue_metrics(&self.store).await?;
        }
        self.metrics.run_upkeep();
        let text = "text/plain; version=0.0.4; charset=utf-8";
        Ok(([(header::CONTENT_TYPE, text)], self.metrics.render()).into_response())
    }
}

/// Brings the figures of the queue up to date. Whoever asks for `/metrics` has it done; who pushes figures has to.
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
