//! What operators ask: does the process live, can it serve, how is it doing.

use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::sync::Mutex;

use super::Front;
use super::keys::Operator;
use super::problem::{Kind, Problem};
use crate::blobs;

/// How long an answer of the object store is believed, so that questions do not become load.
const BELIEVED: Duration = Duration::from_secs(5);

/// The object store's last answer.
#[derive(Default)]
pub(super) struct Probe(Mutex<Option<(Instant, Result<(), blobs::Error>)>>);

impl Probe {
    async fn ask(&self, front: &Front) -> Result<(), blobs::Error> {
        let mut last = self.0.lock().await; // who comes meanwhile hears the same answer
        if let Some((at, answer)) = &*last
            && at.elapsed() < BELIEVED
        {
            return answer.clone();
        }
        let answer = front.blobs.probe().await;
        *last = Some((Instant::now(), answer.clone()));
        answer
    }
}

/// Says that the process lives
#[utoipa::path(
    get, path = "/healthz", tag = "operations", security(()),
    responses((status = 200, description = "It does", body = String, content_type = "text/plain")),
)]
pub(super) async fn healthz() -> &'static str {
    "ok\n"
}

/// Says whether the server can serve
///
/// Database, schema and object store answer, and the server is not about to end. An object store that is full only takes no
/// uploads; the answer says so.
#[utoipa::path(
    get, path = "/readyz", tag = "operations", security(()),
    responses((status = 200, description = "It can", body = String, content_type = "text/plain")),
    extensions(("x-problems" = json!([]))),
)]
pub(super) async fn readyz(State(front): State<Front>) -> Result<&'static str, Problem> {
    if front.closing.is_cancelled() {
        return Err(Problem::new(Kind::Unavailable, "the server is about to end"));
    }
    front.store.ping().await?;
    front.store.check_schema().await?;
    match front.probe.ask(&front).await {
        Ok(()) => Ok("ok\n"),
        // What is there can be read and deleted, which is what makes room.
        Err(blobs::Error::Full) => Ok("ok, but the object store is full: uploads are refused\n"),
        Err(error) => Err(Problem::away("object store", &error)),
    }
}

/// Reads the server's figures
///
/// In the text format of Prometheus. They tell of all tenants: a key needs the scope `admin`.
#[utoipa::path(
    get, path = "/metrics", tag = "operations",
    responses((status = 200, description = "The figures", body = String, content_type = "text/plain")),
    extensions(("x-problems" = json!(["scope"]))),
)]
pub(super) async fn metrics(State(front): State<Front>, _operator: Operator) -> Result<Response, Problem> {
    figures(&front).await
}

async fn figures(front: &Front) -> Result<Response, Problem> {
    for gauge in front.store.gauges().await?.kinds {
        let labels = [("kind", gauge.kind.as_str())];
        metrics::gauge!("hypnos_jobs_queued", &labels).set(gauge.queued as f64);
        metrics::gauge!("hypnos_jobs_running", &labels).set(gauge.running as f64);
        metrics::gauge!("hypnos_jobs_oldest_queued_seconds", &labels)
            .set(gauge.oldest_queued_ms as f64 / 1e3);
    }
    front.metrics.run_upkeep();
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], front.metrics.render())
        .into_response())
}

/// The same for a listener that only operators reach.
pub(super) fn open_routes() -> Router<Front> {
    let open_metrics = |State(front): State<Front>| async move { figures(&front).await };
    Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(open_metrics))
}
