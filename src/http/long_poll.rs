//! Long polling: responses that wait for a change of a job or for its end (`Prefer: wait=N`).

use std::time::Duration;

use axum::http::{HeaderMap, header};
use tokio::time::{Instant, sleep_until};

use super::auth::Caller;
use super::conditional::{etag, matches_etag, version_tag};
use super::prefer::preferred_wait;
use super::problem::Problem;
use super::state::AppState;
use crate::job::{Job, JobId, Kind};
use crate::store::QueuePlace;

/// How often the job is polled.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// The caller's job and its place in the queue: at once, or, with `Prefer: wait`, once it has changed from what the
/// client has (`If-None-Match`) or, without that, once it has ended; at the latest after the time that the client
/// waits.
pub(super) async fn long_poll(
    app: &AppState,
    caller: &mut Caller,
    id: JobId,
    kind: Kind,
    headers: &HeaderMap,
) -> Result<(Job, Option<QueuePlace>), Problem> {
    let job = app.find_job(caller.tenant, id, kind).await?;
    let place = app.store.queue_place(&job).await?;
    let Some(time) = preferred_wait(headers) else { return Ok((job, place)) };
    let is_conditional = headers.contains_key(header::IF_NONE_MATCH);
    if is_conditional && !matches_etag(headers, &etag(&job, place)) {
        return Ok((job, place));
    }
    let seen = version_tag(&job, place);
    let done =
        |job: &Job, place| job.state.is_terminal() || (is_conditional && version_tag(job, place) != seen);
    let job = wait_until(app, caller, (job, place), time, done).await?;
    let place = app.store.queue_place(&job).await?;
    Ok((job, place))
}

/// Waits until `done` is true of the job and its place in the queue, and returns the job. Ends earlier after `time`,
/// when the caller's key expires, when the server shuts down, or when the permit is revoked.
pub(super) async fn wait_until(
    app: &AppState,
    caller: &mut Caller,
    (mut job, place): (Job, Option<QueuePlace>),
    time: Duration,
    done: impl Fn(&Job, Option<QueuePlace>) -> bool,
) -> Result<Job, Problem> {
    let mut deadline = Instant::now() + time;
    if let Some(expires_at) = caller.expires_at() {
        deadline = deadline.min(expires_at);
    }
    if job.state.is_terminal() || Instant::now() >= deadline {
        return Ok(job);
    }
    caller.release_permit();
    let mut watch = app.positions.watch(place);
    let Ok(permit) = app.pools.waits.acquire(caller.tenant).await else { return Ok(job) };
    while !done(&job, watch.get(&job).await?) && Instant::now() < deadline {
        tokio::select! {
            () = sleep_until(deadline.min(Instant::now() + POLL_INTERVAL)) => {}
            () = permit.revoked() => break,
            () = app.closing.cancelled() => break,
        }
        if app.store.version(job.tenant, job.id).await? != Some(job.version) {
            job = app.find_job(job.tenant, job.id, job.kind).await?;
        }
    }
    Ok(job)
}
