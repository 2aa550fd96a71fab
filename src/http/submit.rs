//! The door of the queue: a request's own name, the row, and what the client is told.

use axum::Json;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use sha2::{Digest, Sha256};
use tracing::{Instrument, Span};

use super::Front;
use super::keys::Caller;
use super::problem::{Kind as ProblemKind, Problem};
use super::reading::{RETRY_AFTER_SECS, find};
use crate::blobs;
use crate::job::{Job, JobId, Kind, State, TenantId};
use crate::retry::{self, Retried, Terms, retry};
use crate::store::{Idempotency, NewJob, Submitted};
use crate::telemetry;

const KEY_CHARS_MAX: usize = 255;
const REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");

/// The `Idempotency-Key` that a client gave its request, if it did.
pub(super) fn idempotency_key(headers: &HeaderMap) -> Result<Option<&str>, Problem> {
    let mut keys = headers.get_all("idempotency-key").iter();
    let Some(key) = keys.next() else { return Ok(None) };
    let text = key.to_str().ok().filter(|text| {
        (1..=KEY_CHARS_MAX).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
    });
    if let (Some(text), None) = (text, keys.next()) {
        return Ok(Some(text));
    }
    let detail = format!("Idempotency-Key: wanted one, of 1 to {KEY_CHARS_MAX} visible ASCII characters");
    Err(Problem::new(ProblemKind::BadParameter, detail))
}

/// What makes the same request, sent twice, one job; none without an `Idempotency-Key`. `parts` are all that is asked
/// for, in an order that does not depend on the sender.
pub(super) fn idempotency<'a>(
    headers: &HeaderMap,
    parts: impl IntoIterator<Item = &'a [u8]>,
) -> Result<Option<Idempotency>, Problem> {
    let Some(key) = idempotency_key(headers)? else { return Ok(None) };
    let mut request = RequestHash::default();
    parts.into_iter().for_each(|part| request.add(part));
    Ok(Some(request.named(key)))
}

/// A hash of all that is asked for.
#[derive(Default)]
pub(super) struct RequestHash(Sha256);

impl RequestHash {
    /// Adds the next part.
    pub(super) fn add(&mut self, part: &[u8]) {
        self.0.update((part.len() as u64).to_le_bytes());
        self.0.update(part);
    }

    /// Adds the next part, which is `bytes` long and read piece by piece.
    pub(super) fn add_from(&mut self, bytes: u64, mut part: impl std::io::Read) -> std::io::Result<()> {
        self.0.update(bytes.to_le_bytes());
        let mut piece = vec![0; 256 << 10];
        loop {
            match part.read(&mut piece)? {
                0 => return Ok(()),
                n => self.0.update(&piece[..n]),
            }
        }
    }

    /// The request of this hash under its name.
    pub(super) fn named(self, key: &str) -> Idempotency {
        Idempotency { key: key.to_owned(), request_hash: format!("{:x}", self.0.finalize()) }
    }
}

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
    let job = find(front, tenant, id, kind).await?;
    may_be_done_again(job.state)?;
    caller.step_aside();
    let bytes = job.photos.iter().map(|photo| photo.size).sum();
    let turn = front.line.admit(tenant, bytes).await?.turn(bytes).await?;
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
            find(front, tenant, id, kind).await?;
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
