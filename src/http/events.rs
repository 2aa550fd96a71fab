//! `/v1/jobs/{id}/events`: a training as it changes, as server-sent events.
//!
//! Every event is the whole training, so that one that was missed is no loss. The table is asked once a second; hints from
//! the store only make it sooner.

use std::convert::Infallible;
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::{Stream, stream};
use tokio::sync::OwnedSemaphorePermit;

use super::Front;
use super::keys::Reader;
use super::problem::{Kind as ProblemKind, Problem};
use super::reading::{Id, find};
use super::view::JobView;
use crate::job::{Job, JobId, Kind};
use crate::store::Wakes;

const LOOK: Duration = Duration::from_secs(1);
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// When a client that was cut off should come back.
const RETRY: Duration = Duration::from_secs(2);

/// Follows a training
///
/// Server-sent events: `job` carries the training as JSON each time it has changed, and its version as the id; `end` says
/// that it has ended, and the stream closes. Whoever reconnects with `Last-Event-ID` is not told again what it has.
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
    reader: Reader,
    Id(id): Id,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let Ok(place) = front.streams.clone().try_acquire_owned() else {
        return Err(Problem::new(ProblemKind::Overloaded, "too many event streams at once"));
    };
    find(&front, reader.tenant, id, Kind::Train).await?;
    let seen = headers.get("last-event-id").and_then(|id| id.to_str().ok()?.parse().ok());
    let watch =
        Watch { wakes: front.store.wakes(), front, reader, id, seen, next: Next::Look, _place: place };
    let events = Sse::new(follow(watch)).keep_alive(KeepAlive::new().interval(KEEP_ALIVE));
    let mut response = events.into_response();
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

/// One client that follows one training.
struct Watch {
    front: Front,
    reader: Reader,
    id: JobId,
    /// The version that the client has.
    seen: Option<i64>,
    wakes: Wakes,
    next: Next,
    _place: OwnedSemaphorePermit,
}

/// What a stream does next.
enum Next {
    Look,
    Rest,
    End,
    Close,
}

fn follow(watch: Watch) -> impl Stream<Item = Result<Event, Infallible>> {
    stream::unfold(watch, |mut watch| async move {
        loop {
            match watch.next {
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
    /// The training, if the client does not have it yet.
    async fn look(&mut self) -> Option<Event> {
        self.next = Next::Rest;
        let Some(version) = self.front.store.version(self.reader.tenant, self.id).await.transpose() else {
            self.next = Next::End; // it was deleted
            return None;
        };
        // A database that is away now may be back at the next look.
        let version = version.ok()?;
        let job = self.front.store.find(self.reader.tenant, self.id, Kind::Train).await.ok()??;
        if job.state.is_terminal() {
            self.next = Next::End;
        }
        if self.seen == Some(version) && job.version == version {
            return None;
        }
        self.seen = Some(job.version);
        self.event(&job).await
    }

    async fn event(&self, job: &Job) -> Option<Event> {
        let place = self.front.store.queue_position(job).await.ok()?;
        let view = JobView::of(job, place, &self.front.settings.public_url).ok()?;
        let json = serde_json::to_string(&view).ok()?;
        Some(Event::default().event("job").id(job.version.to_string()).data(json))
    }

    /// Waits for a hint or a second; none when the server ends.
    async fn rest(&mut self) -> Option<()> {
        let hint = tokio::time::timeout(LOOK, self.wakes.wait());
        self.front.closing.run_until_cancelled(hint).await.map(drop)
    }
}
