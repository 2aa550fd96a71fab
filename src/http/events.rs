//! `/v1/jobs/{id}/events`: a training as it changes, as server-sent events.
//!
//! Every event is the whole training, so that one that was missed is no loss. The table is asked once a second; hints from
//! the store only make it sooner. The first byte goes at once and others every few seconds, and proxies are told not to
//! gather them: nginx would otherwise keep the first events for itself and end the stream after a minute.

use std::convert::Infallible;
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::{Stream, stream};

use super::auth::Reader;
use super::conditional::version;
use super::extract::Id;
use super::fair_pool::Place;
use super::problem::Problem;
use super::queue_position::Position;
use super::state::Front;
use super::view::JobView;
use crate::job::{Job, JobId, Kind};
use crate::store::Wakes;

const LOOK: Duration = Duration::from_secs(1);
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// When a client that was cut off should come back.
const RETRY: Duration = Duration::from_secs(2);
/// What nginx, and others after it, read as: pass this on as it comes.
const BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

/// Follows a training
///
/// Server-sent events: `job` carries the training as JSON each time it has changed, its place in the queue included, and
/// its version as the id; `end` says that it has ended, and the stream closes. Whoever reconnects with `Last-Event-ID` is not
/// told again what it has. A comment comes at once and then every 15 seconds.
#[utoipa::path(
    get, path = "/v1/jobs/{id}/events", tag = "jobs",
    params(
        ("id" = Uuid, Path, description = "The training"),
        ("Last-Event-ID" = Option<String>, Header, description = "The id of the last event that the client has"),
    ),
    responses((status = 200, description = "The events", body = String, content_type = "text/event-stream")),
    extensions(("x-problems" = json!(["not-found"]))),
)]
pub(super) async fn job_events(
    State(front): State<Front>,
    mut reader: Reader,
    Id(id): Id,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let job = front.find_job(reader.tenant, id, Kind::Train).await?;
    reader.step_aside();
    let place = front.shares.streams.take(reader.tenant).await?;
    let seen = headers.get("last-event-id").and_then(|id| id.to_str().ok()).map(ToOwned::to_owned);
    let (wakes, position) = (front.store.wakes(), front.positions.follow(None));
    let job = Some(job);
    let watch = Watch { wakes, position, front, reader, id, job, seen, next: Next::Greet, place };
    let events = Sse::new(follow(watch)).keep_alive(KeepAlive::new().interval(KEEP_ALIVE));
    let mut response = events.into_response();
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store, no-transform"));
    headers.insert(BUFFERING, HeaderValue::from_static("no"));
    Ok(response)
}

/// One client that follows one training.
struct Watch {
    front: Front,
    reader: Reader,
    id: JobId,
    /// The row as it was last read.
    job: Option<Job>,
    /// The version that the client has.
    seen: Option<String>,
    position: Position,
    wakes: Wakes,
    next: Next,
    place: Place,
}

/// What a stream does next.
enum Next {
    Greet,
    Look,
    Rest,
    End,
    Close,
}

fn follow(watch: Watch) -> impl Stream<Item = Result<Event, Infallible>> {
    stream::unfold(watch, |mut watch| async move {
        loop {
            watch.place.sign();
            match watch.next {
                Next::Greet => {
                    watch.next = Next::Look;
                    return Some((Ok(Event::default().comment("open").retry(RETRY)), watch));
                }
                Next::Look => {
                    if let Some(event) = watch.look().await {
                        return Some((Ok(event), watch));
                    }
                }
                Next::Rest => {
                    if watch.rest().await.is_none() || !watch.reader.still(&watch.front).await {
                        watch.next = Next::Close;
                        return Some((Ok(Event::default().retry(RETRY).comment("come back")), watch));
                    }
                    watch.next = Next::Look;
                }
                Next::End => {
                    watch.next = Next::Close;
                    return Some((Ok(Event::default().event("end").data("{}")), watch));
                }
                Next::Close => return None,
            }
        }
    })
}

impl Watch {
    /// The training, if the client does not have it yet. A database that is away now may be back at the next look.
    async fn look(&mut self) -> Option<Event> {
        self.next = Next::Rest;
        let Some(row) = self.front.store.version(self.reader.tenant, self.id).await.ok()? else {
            self.next = Next::End; // it was deleted
            return None;
        };
        if self.job.as_ref().is_none_or(|job| job.version != row) {
            self.job = self.front.store.find(self.reader.tenant, self.id, Kind::Train).await.ok()?;
        }
        let job = self.job.as_ref()?;
        if job.state.is_terminal() {
            self.next = Next::End;
        }
        let place = self.position.of(job).await.ok()?;
        let version = version(job, place);
        if self.seen.as_ref() == Some(&version) {
            return None;
        }
        let view = JobView::of(job, place, &self.front.settings.public_url).ok()?;
        let event = Event::default().event("job").id(&version).data(serde_json::to_string(&view).ok()?);
        self.seen = Some(version);
        Some(event)
    }

    /// Waits for a hint or a second; none when the stream ends: the server does, or another tenant needs the place.
    async fn rest(&mut self) -> Option<()> {
        tokio::select! {
            _ = tokio::time::timeout(LOOK, self.wakes.wait()) => Some(()),
            () = self.front.closing.cancelled() => None,
            () = self.place.asked_back() => None,
        }
    }
}
