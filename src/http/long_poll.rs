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

/// How often the job is polled.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// The caller's job and its queue position: at once, or, with `Prefer: wait`, once it has changed from what the client
/// has (`If-None-Match`) or, without that, once it has ended; at the latest after the time that the client waits.
pub(super) async fn long_poll(
    app: &AppState,
    caller: &mut Caller,
    id: JobId,
    kind: Kind,
    headers: &HeaderMap,
) -> Result<(Job, Option<u64>), Problem> {
    let job = app.find_job(caller.tenant, id, kind).await?;
    let queue_position = app.store.queue_position(&job).await?;
    let Some(time) = preferred_wait(headers) else { return Ok((job, queue_position)) };
    let is_conditional = headers.contains_key(header::IF_NONE_MATCH);
    if is_conditional && !matches_etag(headers, &etag(&job, queue_position)) {
        return Ok((job, queue_position));
    }
    let seen = version_tag(&job, queue_position);
    let done = |job: &Job, queue_position| {
        job.state.is_terminal() || (is_conditional && version_tag(job, queue_position) != seen)
    };
    let job = wait_until(app, caller, (job, queue_position), time, done).await?;
    let queue_position = app.store.queue_position(&job).await?;
    Ok((job, queue_position))
}

/// Waits until `done` is true of the job and its queue position, and returns the job. Ends earlier after `time`, when
/// the caller's key expires, when the server shuts down, or when the permit is revoked.
pub(super) async fn wait_until(
    app: &AppState,
    caller: &mut Caller,
    (mut job, queue_position): (Job, Option<u64>),
    time: Duration,
    done: impl Fn(&Job, Option<u64>) -> bool,
) -> Result<Job, Problem> {
    let mut deadline = Instant::now() + time;
    if let Some(expires_at) = caller.expires_at() {
        deadline = deadline.min(expires_at);
    }
    if job.state.is_terminal() || Instant::now() >= deadline {
        return Ok(job);
    }
    caller.release_permit();
    let mut watch = app.positions.watch(queue_position);
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
