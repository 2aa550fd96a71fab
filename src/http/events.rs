//! `/v1/jobs/{id}/events`: a training's changes as server-sent events.
//!
//! Every event is the whole training, so a missed one is no loss. The database is polled once a second; notifications
//! only make it sooner. The first byte is sent at once and others every few seconds, and proxies are told not to buffer
//! them: nginx would otherwise hold back the first events and end the stream after a minute.

use std::convert::Infallible;
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::{Stream, stream};

use super::auth::Reader;
use super::conditional::version_tag;
use super::extract::PathId;
use super::fair_pool::Permit;
use super::problem::Problem;
use super::queue_position::PositionWatch;
use super::state::AppState;
use super::view::JobView;
use crate::job::{Job, JobId, Kind};
use crate::store::Subscription as Notifications;

const POLL_INTERVAL: Duration = Duration::from_secs(1);
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// When a disconnected client should reconnect.
const RETRY: Duration = Duration::from_secs(2);
/// Tells nginx, and proxies that follow it, not to buffer the response.
const X_ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

/// Streams a training's changes
///
/// Server-sent events: `job` carries the training as JSON each time it or its queue position has changed, with its
/// version as the id; `end` says that it has ended, and the stream closes. A client that reconnects with
/// `Last-Event-ID` does not get again what it has. A comment is sent at once and then every 15 seconds.
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
    State(app): State<AppState>,
    mut reader: Reader,
    PathId(id): PathId,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let job = app.find_job(reader.tenant, id, Kind::Train).await?;
    reader.release_permit();
    let permit = app.pools.streams.acquire(reader.tenant).await?;
    let sent = headers.get("last-event-id").and_then(|id| id.to_str().ok()).map(ToOwned::to_owned);
    let (notifications, position) = (app.store.subscribe(), app.positions.watch(None));
    let job = Some(job);
    let subscription =
        Subscription { notifications, position, app, reader, id, job, sent, step: Step::Open, permit };
    let events = Sse::new(event_stream(subscription)).keep_alive(KeepAlive::new().interval(KEEP_ALIVE));
    let mut response = events.into_response();
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store, no-transform"));
    headers.insert(X_ACCEL_BUFFERING, HeaderValue::from_static("no"));
    Ok(response)
}

/// One client's stream of one training.
struct Subscription {
    app: AppState,
    reader: Reader,
    id: JobId,
    /// The training as it was last read.
    job: Option<Job>,
    /// The version that was sent last.
    sent: Option<String>,
    position: PositionWatch,
    notifications: Notifications,
    step: Step,
    permit: Permit,
}

/// What the stream does next.
enum Step {
    Open,
    Poll,
    Wait,
    End,
    Close,
}

fn event_stream(subscription: Subscription) -> impl Stream<Item = Result<Event, Infallible>> {
    stream::unfold(subscription, |mut subscription| async move {
        loop {
            subscription.permit.touch();
            match subscription.step {
                Step::Open => {
                    subscription.step = Step::Poll;
                    return Some((Ok(Event::default().comment("open").retry(RETRY)), subscription));
                }
                Step::Poll => {
                    if let Some(event) = subscription.next_event().await {
                        return Some((Ok(event), subscription));
                    }
                }
                Step::Wait => {
                    if subscription.wait().await.is_none()
                        || !subscription.reader.is_still_valid(&subscription.app).await
                    {
                        subscription.step = Step::Close;
                        return Some((Ok(Event::default().retry(RETRY).comment("come back")), subscription));
                    }
                    subscription.step = Step::Poll;
                }
                Step::End => {
                    subscription.step = Step::Close;
                    return Some((Ok(Event::default().event("end").data("{}")), subscription));
                }
                Step::Close => return None,
            }
        }
    })
}

impl Subscription {
    /// The training, if it has changed since it was sent. After an error of the database the next poll tries again.
    async fn next_event(&mut self) -> Option<Event> {
        self.step = Step::Wait;
        let Some(row) = self.app.store.version(self.reader.tenant, self.id).await.ok()? else {
            self.step = Step::End; // it was deleted
            return None;
        };
        if self.job.as_ref().is_none_or(|job| job.version != row) {
            self.job = self.app.store.find(self.reader.tenant, self.id, Kind::Train).await.ok()?;
        }
        let job = self.job.as_ref()?;
        if job.state.is_terminal() {
            self.step = Step::End;
        }
        let place = self.position.get(job).await.ok()?;
        let version = version_tag(job, place);
        if self.sent.as_ref() == Some(&version) {
            return None;
        }
        let view = JobView::of(job, place, &self.app.settings.public_url).ok()?;
        let event = Event::default().event("job").id(&version).data(serde_json::to_string(&view).ok()?);
        self.sent = Some(version);
        Some(event)
    }

    /// Waits for a notification or a second; none when the stream has to end: the server does, or its permit is
    /// revoked.
    async fn wait(&mut self) -> Option<()> {
        tokio::select! {
            _ = tokio::time::timeout(POLL_INTERVAL, self.notifications.wait()) => Some(()),
            () = self.app.closing.cancelled() => None,
            () = self.permit.revoked() => None,
        }
    }
}
