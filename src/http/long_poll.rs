//! Answers that wait for a change or for the end (`Prefer: wait=N`).

use std::time::Duration;

use axum::http::{HeaderMap, header};
use tokio::time::{Instant, sleep_until};

use super::auth::Caller;
use super::conditional::{etag, has, version};
use super::prefer::preferred_wait;
use super::problem::Problem;
use super::state::Front;
use crate::job::{Job, JobId, Kind};

/// How often a row that somebody waits for is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// The caller's job and its place in the queue, as soon as there is something to say: at once, or within the time that
/// the client is willing to wait for a change of what it has, or for the end.
pub(super) async fn look(
    front: &Front,
    caller: &mut Caller,
    id: JobId,
    kind: Kind,
    headers: &HeaderMap,
) -> Result<(Job, Option<u64>), Problem> {
    let job = front.find_job(caller.tenant, id, kind).await?;
    let place = front.store.queue_position(&job).await?;
    let Some(time) = preferred_wait(headers) else { return Ok((job, place)) };
    let known = headers.contains_key(header::IF_NONE_MATCH);
    if known && !has(headers, &etag(&job, place)) {
        return Ok((job, place));
    }
    let seen = version(&job, place);
    let enough = |job: &Job, place| job.state.is_terminal() || (known && version(job, place) != seen);
    let job = wait(front, caller, (job, place), time, enough).await?;
    let place = front.store.queue_position(&job).await?;
    Ok((job, place))
}

/// The job once `enough` is true of it and its place in the queue, or after `time`, or when the key or the server ends, or when others wait whose
/// tenants have fewer who do, whichever comes first.
pub(super) async fn wait(
    front: &Front,
    caller: &mut Caller,
    (mut job, place): (Job, Option<u64>),
    time: Duration,
    enough: impl Fn(&Job, Option<u64>) -> bool,
) -> Result<Job, Problem> {
    let mut deadline = Instant::now() + time;
    if let Some(ends) = caller.ends() {
        deadline = deadline.min(ends);
    }
    if job.state.is_terminal() || Instant::now() >= deadline {
        return Ok(job);
    }
    caller.step_aside();
    let mut position = front.positions.follow(place);
    let Ok(place) = front.shares.waits.take(caller.tenant).await else { return Ok(job) };
    while !enough(&job, position.of(&job).await?) && Instant::now() < deadline {
        tokio::select! {
            () = sleep_until(deadline.min(Instant::now() + LOOK)) => {}
            () = place.asked_back() => break,
            () = front.closing.cancelled() => break,
        }
        if front.store.version(job.tenant, job.id).await? != Some(job.version) {
            job = front.find_job(job.tenant, job.id, job.kind).await?;
        }
    }
    Ok(job)
}
