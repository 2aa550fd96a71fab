//! Answers that wait for a change or for the end (`Prefer: wait=N`).

use std::time::Duration;

use axum::http::{HeaderMap, header};
use tokio::time::{Instant, sleep_until};

use super::auth::Caller;
use super::conditional::{etag, matches_etag, version_tag};
use super::prefer::preferred_wait;
use super::problem::Problem;
use super::state::AppState;
use crate::job::{Job, JobId, Kind};

/// How often a row that somebody waits for is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// The caller's job and its place in the queue, as soon as there is something to say: at once, or within the time that
/// the client is willing to wait for a change of what it has, or for the end.
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

/// The job once `done` is true of it and its place in the queue, or after `time`, or when the key or the server ends, or when others wait whose
/// tenants have fewer who do, whichever comes first.
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
