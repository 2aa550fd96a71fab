//! The door of the queue: a request's own name, the row, and what the client is told.

use axum::Json;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use tracing::{Instrument, Span};

use super::auth::Caller;
use super::conditional::RETRY_AFTER_SECS;
use super::idempotency::idempotency;
use super::problem::{Kind as ProblemKind, Problem};
use super::state::Front;
use crate::blobs;
use crate::job::{Job, JobId, Kind, State, TenantId};
use crate::retry::{self, Retried, Terms, retry};
use crate::store::{Idempotency, NewJob, Submitted};
use crate::telemetry;

const REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");

/// A job that is in the queue, and whether it was there before.
pub(super) struct Accepted {
    pub(super) job: Job,
    pub(super) replayed: bool,
}

/// What became of the same request if it was sent before.
pub(super) async fn replay(
    front: &Front,
    tenant: TenantId,
    idempotency: Option<&Idempotency>,
) -> Result<Option<Accepted>, Problem> {
    let Some(idempotency) = idempotency else { return Ok(None) };
    let before = front.store.replay(tenant, idempotency).await?;
    before.map(accepted).transpose()
}

/// Puts a job into the queue.
pub(super) async fn submit(front: &Front, job: NewJob) -> Result<Accepted, Problem> {
    accepted(front.store.submit(job).await?)
}

/// Does a job of that kind again that failed or was canceled. Its photos are copied with a place in the line of uploads, for
/// they are in memory meanwhile.
pub(super) async fn again(
    front: &Front,
    caller: &mut Caller,
    id: JobId,
    kind: Kind,
    headers: &HeaderMap,
) -> Result<Accepted, Problem> {
    let tenant = caller.tenant;
    let idempotency = idempotency(headers, [&b"retry"[..], id.to_string().as_bytes()])?;
    if let Some(before) = replay(front, tenant, idempotency.as_ref()).await? {
        return Ok(before);
    }
    let job = front.find_job(tenant, id, kind).await?;
    may_be_done_again(job.state)?;
    caller.step_aside();
    let bytes = job.photos.iter().map(|photo| photo.size).sum();
    let turn = front.uploads.admit(tenant, bytes).await?.turn(bytes).await?;
    let terms = Terms {
        max_attempts: front.settings.attempts_max,
        queue_max: front.settings.queue_max,
        idempotency,
        trace: telemetry::traceparent(&Span::current()),
    };
    // To its end, whether or not the client still listens: between the copies and the row nothing may be dropped.
    let work = {
        let front = front.clone();
        async move {
            let retried = retry(&front.store, &front.blobs, &job, terms).await;
            drop(turn);
            retried
        }
    };
    let retried = tokio::spawn(work.in_current_span()).await.map_err(|error| Problem::internal(&error))?;
    match retried {
        Ok(Retried::Submitted(submitted)) => accepted(submitted),
        Ok(Retried::WrongState(state)) => {
            Err(may_be_done_again(state).err().unwrap_or_else(|| Problem::not_found("job")))
        }
        Err(retry::Error::Store(error)) => Err(error.into()),
        // Whoever deletes a job takes its photos first.
        Err(retry::Error::Blobs(blobs::Error::Missing)) => {
            front.find_job(tenant, id, kind).await?;
            Err(blobs::Error::Missing.into())
        }
        Err(retry::Error::Blobs(error)) => Err(error.into()),
    }
}

fn may_be_done_again(state: State) -> Result<(), Problem> {
    if matches!(state, State::Failed | State::Canceled) {
        return Ok(());
    }
    Err(Problem::new(ProblemKind::WrongState, format!("the job is {state}; wanted failed or canceled")))
}

fn accepted(submitted: Submitted) -> Result<Accepted, Problem> {
    match submitted {
        Submitted::New(job) => Ok(Accepted { job, replayed: false }),
        Submitted::Replayed(job) => Ok(Accepted { job, replayed: true }),
        Submitted::OtherRequest => Err(Problem::new(
            ProblemKind::KeyReused,
            "this Idempotency-Key was sent with another request before",
        )),
        Submitted::QueueFull => {
            Err(Problem::new(ProblemKind::QueueFull, "as many jobs are waiting as may wait"))
        }
        Submitted::Disabled => Err(Problem::tenant_disabled()),
        Submitted::NoParent(None) => Err(Problem::not_found("job")),
        Submitted::NoParent(Some(state)) => {
            Err(Problem::new(ProblemKind::WrongState, format!("the job is {state}; wanted succeeded")))
        }
    }
}

/// The answer to a job that was accepted.
pub(super) fn answer(status: StatusCode, location: &str, replayed: bool, body: impl Serialize) -> Response {
    let mut response = (status, Json(body)).into_response();
    let headers = response.headers_mut();
    if let Ok(location) = HeaderValue::from_str(location) {
        headers.insert(header::LOCATION, location);
    }
    if status == StatusCode::ACCEPTED {
        headers.insert(header::RETRY_AFTER, HeaderValue::from(RETRY_AFTER_SECS));
    }
    if replayed {
        headers.insert(REPLAYED, HeaderValue::from_static("true"));
    }
    response
}

/// Numbers that nobody can guess, for seeds that were not asked for.
pub(super) fn drawn_seed() -> Result<u64, Problem> {
    getrandom::u64().map_err(|error| Problem::internal(&error))
}
