//! Enqueues jobs: idempotent submission, retries, and the response to an accepted job.

use axum::Json;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use tracing::{Instrument, Span};

use super::auth::Caller;
use super::conditional::POLL_AFTER_SECS;
use super::idempotency::idempotency;
use super::problem::{Kind as ProblemKind, Problem};
use super::state::AppState;
use crate::blobs;
use crate::job::{Job, JobId, Kind, State, TenantId};
use crate::retry::{self, Retried, Terms, retry};
use crate::store::{Idempotency, NewJob, Submitted};
use crate::telemetry;

const IDEMPOTENT_REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");

/// An accepted job, and whether an earlier request had created it.
pub(super) struct Accepted {
    pub(super) job: Job,
    pub(super) replayed: bool,
}

/// The job of an earlier request with the same key and contents, if there is one.
pub(super) async fn replay(
    app: &AppState,
    tenant: TenantId,
    idempotency: Option<&Idempotency>,
) -> Result<Option<Accepted>, Problem> {
    let Some(idempotency) = idempotency else { return Ok(None) };
    let existing = app.store.replay(tenant, idempotency).await?;
    existing.map(accept).transpose()
}

/// Enqueues a job.
pub(super) async fn submit(app: &AppState, job: NewJob) -> Result<Accepted, Problem> {
    accept(app.store.submit(job).await?)
}

/// Retries a failed or canceled job of that kind, as a new job. Its photos are copied with a permit of the upload
/// queue, since they are in memory meanwhile.
pub(super) async fn resubmit(
    app: &AppState,
    caller: &mut Caller,
    id: JobId,
    kind: Kind,
    headers: &HeaderMap,
) -> Result<Accepted, Problem> {
    let tenant = caller.tenant;
    let idempotency = idempotency(headers, [&b"retry"[..], id.to_string().as_bytes()])?;
    if let Some(existing) = replay(app, tenant, idempotency.as_ref()).await? {
        return Ok(existing);
    }
    let job = app.find_job(tenant, id, kind).await?;
    check_retryable(job.state)?;
    caller.release_permit();
    let bytes = job.photos.iter().map(|photo| photo.size).sum();
    let slot = app.uploads.admit(tenant, bytes).await?.wait_for_slot(bytes).await?;
    let terms = Terms {
        max_attempts: app.settings.attempts_max,
        queue_max: app.settings.queue_max,
        idempotency,
        trace: telemetry::traceparent(&Span::current()),
    };
    // Runs to its end even if the client disconnects: canceled between the copies and the row, it would leave objects
    // that no row names.
    let work = {
        let app = app.clone();
        async move {
            let retried = retry(&app.store, &app.blobs, &job, terms).await;
            drop(slot);
            retried
        }
    };
    let retried = tokio::spawn(work.in_current_span()).await.map_err(|error| Problem::internal(&error))?;
    match retried {
        Ok(Retried::Submitted(submitted)) => accept(submitted),
        Ok(Retried::WrongState(state)) => {
            Err(check_retryable(state).err().unwrap_or_else(|| Problem::not_found("job")))
        }
        Err(retry::Error::Store(error)) => Err(error.into()),
        // A deletion removes the photos first.
        Err(retry::Error::Blobs(blobs::Error::Missing)) => {
            app.find_job(tenant, id, kind).await?;
            Err(blobs::Error::Missing.into())
        }
        Err(retry::Error::Blobs(error)) => Err(error.into()),
    }
}

fn check_retryable(state: State) -> Result<(), Problem> {
    if matches!(state, State::Failed | State::Canceled) {
        return Ok(());
    }
    Err(Problem::new(ProblemKind::WrongState, format!("the job is {state}; wanted failed or canceled")))
}

fn accept(submitted: Submitted) -> Result<Accepted, Problem> {
    match submitted {
        Submitted::New(job) => Ok(Accepted { job, replayed: false }),
        Submitted::Replayed(job) => Ok(Accepted { job, replayed: true }),
        Submitted::OtherRequest => Err(Problem::new(
            ProblemKind::KeyReused,
            "this Idempotency-Key was sent with another request before",
        )),
        Submitted::QueueFull => {
            Err(Problem::new(ProblemKind::QueueFull, "this tenant has as many queued jobs as it may have"))
        }
        Submitted::Disabled => Err(Problem::tenant_disabled()),
        Submitted::NoParent(None) => Err(Problem::not_found("job")),
        Submitted::NoParent(Some(state)) => {
            Err(Problem::new(ProblemKind::WrongState, format!("the job is {state}; wanted succeeded")))
        }
    }
}

/// The response with an accepted job.
pub(super) fn job_response(
    status: StatusCode,
    location: &str,
    replayed: bool,
    body: impl Serialize,
) -> Response {
    let mut response = (status, Json(body)).into_response();
    let headers = response.headers_mut();
    if let Ok(location) = HeaderValue::from_str(location) {
        headers.insert(header::LOCATION, location);
    }
    if status == StatusCode::ACCEPTED {
        headers.insert(header::RETRY_AFTER, HeaderValue::from(POLL_AFTER_SECS));
    }
    if replayed {
        headers.insert(IDEMPOTENT_REPLAYED, HeaderValue::from_static("true"));
    }
    response
}

/// An unpredictable seed, for jobs that request none.
pub(super) fn random_seed() -> Result<u64, Problem> {
    getrandom::u64().map_err(|error| Problem::internal(&error))
}
