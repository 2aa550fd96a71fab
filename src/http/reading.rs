//! What reading requests have in common: ids, queries, pages, versions, waiting.

use std::time::Duration;

use axum::Json;
use axum::extract::{FromRequestParts, Path, Query};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep_until};
use utoipa::IntoParams;
use uuid::Uuid;

use super::Front;
use super::edge::preferred_wait;
use super::keys::Caller;
use super::position::Position;
use super::problem::{Kind as ProblemKind, Problem};
use super::view::time;
use crate::job::{Job, JobId, Kind, Object, State, TenantId};
use crate::store::Filter;

/// How often a row that somebody waits for is looked at.
const LOOK: Duration = Duration::from_millis(200);
/// What a client that polls is asked to leave between two looks, in seconds.
pub(super) const RETRY_AFTER_SECS: u64 = 5;

/// The id in a path. What is no id names nothing.
pub(super) struct Id(pub(super) JobId);

impl FromRequestParts<Front> for Id {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, front: &Front) -> Result<Self, Problem> {
        let path = Path::<String>::from_request_parts(parts, front).await;
        let id = path.ok().and_then(|Path(text)| text.parse().ok());
        id.map(Self).ok_or_else(|| Problem::not_found("job"))
    }
}

/// The id and the name after it in a path.
pub(super) struct Within(pub(super) JobId, pub(super) String);

impl FromRequestParts<Front> for Within {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, front: &Front) -> Result<Self, Problem> {
        let path = Path::<(String, String)>::from_request_parts(parts, front).await;
        let within = path.ok().and_then(|Path((id, name))| Some(Self(id.parse().ok()?, name)));
        within.ok_or_else(|| Problem::not_found("job"))
    }
}

/// The query; unknown names are refused.
pub(super) struct Asked<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequestParts<Front> for Asked<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &Front) -> Result<Self, Problem> {
        Query::try_from_uri(&parts.uri).map(|Query(query)| Self(query)).map_err(|error| {
            // The first cause names the parameter; the rejection itself is a general remark.
            let said =
                std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
            Problem::new(ProblemKind::BadParameter, format!("the query: {}", super::body::shorten(&said)))
        })
    }
}

/// Which part of a list.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct PageQuery {
    /// Most entries.
    #[param(minimum = 1, maximum = 200, default = 50)]
    limit: Option<u32>,
    /// Where the page before ended: its `next_cursor`.
    #[param(pattern = "^[0-9a-f]{32}$", min_length = 32, max_length = 32)]
    cursor: Option<String>,
    /// In this state only.
    state: Option<State>,
    /// Of this class only; trainings have one.
    #[param(min_length = 1, max_length = 64)]
    class_name: Option<String>,
    /// Accepted later than this only (RFC 3339).
    #[param(value_type = Option<String>, format = DateTime)]
    created_after: Option<String>,
    /// Drawn with this training only; samples have one.
    #[param(value_type = Option<Uuid>)]
    job_id: Option<String>,
}

impl PageQuery {
    /// The list's filter, where it begins, and how long it may be.
    pub(super) fn parse(&self, kind: Kind) -> Result<(Filter, Option<JobId>, u32), Problem> {
        let wrong = |name: &str, wanted: &str| {
            Problem::new(ProblemKind::BadParameter, format!("{name}: wanted {wanted}"))
        };
        let limit = self.limit.unwrap_or(50);
        if !(1..=200).contains(&limit) {
            return Err(wrong("limit", "1 to 200"));
        }
        let cursor = self.cursor.as_deref().map(|text| {
            let id = Uuid::try_parse(text).ok().filter(|id| id.simple().to_string() == text);
            id.map(JobId).ok_or_else(|| wrong("cursor", "the next_cursor of a page"))
        });
        let created_after = self.created_after.as_deref().map(|text| {
            let time: Option<Timestamp> = text.parse().ok();
            time.map(Timestamp::as_millisecond).ok_or_else(|| wrong("created_after", "a time as in RFC 3339"))
        });
        let class_name = self.class_name.as_deref().map(|text| {
            crate::job::class_name(text).map_err(|invalid| {
                Problem::new(ProblemKind::BadParameter, format!("class_name: {}", invalid.message))
            })
        });
        let parent = self.job_id.as_deref().map(|text| text.parse().map_err(|_| wrong("job_id", "an id")));
        let filter = Filter {
            kind: Some(kind),
            state: self.state,
            class_name: class_name.transpose()?,
            created_after_ms: created_after.transpose()?,
            parent: parent.transpose()?,
        };
        Ok((filter, cursor.transpose()?, limit))
    }

    /// The address of the page that begins after `cursor`.
    fn next_url(&self, base: &str, cursor: &str) -> String {
        let state = self.state.map(|state| state.to_string());
        let asked = [
            ("state", state.as_ref()),
            ("class_name", self.class_name.as_ref()),
            ("created_after", self.created_after.as_ref()),
            ("job_id", self.job_id.as_ref()),
        ];
        let asked = asked.iter().filter_map(|(name, value)| Some(format!("&{name}={}", percent((*value)?))));
        let asked: Vec<_> = asked.collect();
        format!("{base}?limit={}&cursor={cursor}{}", self.limit.unwrap_or(50), asked.concat())
    }
}

/// Text as it may stand in a query (RFC 3986: all but the unreserved is escaped).
fn percent(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    let escape = |byte: u8| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    text.bytes().map(escape).collect()
}

/// One page of a list, newest first.
pub(super) struct Page {
    /// The rows of the page.
    pub(super) jobs: Vec<Job>,
    /// Where the next page begins, if there is one.
    pub(super) next_cursor: Option<String>,
}

impl Page {
    pub(super) async fn read(
        front: &Front,
        tenant: TenantId,
        query: &PageQuery,
        kind: Kind,
    ) -> Result<Self, Problem> {
        let (filter, before, limit) = query.parse(kind)?;
        let mut jobs = front.store.list(tenant, &filter, before, limit + 1).await?;
        let more = jobs.len() > limit as usize;
        jobs.truncate(limit as usize);
        let next_cursor = jobs.last().filter(|_| more).map(|job| job.id.0.simple().to_string());
        Ok(Self { jobs, next_cursor })
    }

    /// The answer, with the `Link` to the next page.
    pub(super) fn answer(
        next_cursor: Option<&str>,
        query: &PageQuery,
        base: &str,
        body: impl Serialize,
    ) -> Response {
        let mut response = Json(body).into_response();
        if let Some(cursor) = next_cursor {
            let link = format!("<{}>; rel=\"next\"", query.next_url(base, cursor));
            if let Ok(link) = HeaderValue::from_str(&link) {
                response.headers_mut().insert(header::LINK, link);
            }
        }
        response
    }
}

/// The caller's job of that kind.
pub(super) async fn find(front: &Front, tenant: TenantId, id: JobId, kind: Kind) -> Result<Job, Problem> {
    let found = front.store.find(tenant, id, kind).await?;
    found.ok_or_else(|| Problem::not_found(if kind == Kind::Train { "job" } else { "sample" }))
}

/// The caller's job and its place in the queue, as soon as there is something to say: at once, or within the time that
/// the client is willing to wait for a change of what it has, or for the end.
pub(super) async fn look(
    front: &Front,
    caller: &mut Caller,
    id: JobId,
    kind: Kind,
    headers: &HeaderMap,
) -> Result<(Job, Option<u64>), Problem> {
    let job = find(front, caller.tenant, id, kind).await?;
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
    let mut position = Position::follow(front, place);
    let Ok(place) = front.shares.waits.take(caller.tenant).await else { return Ok(job) };
    while !enough(&job, position.of(&job).await?) && Instant::now() < deadline {
        tokio::select! {
            () = sleep_until(deadline.min(Instant::now() + LOOK)) => {}
            () = place.asked_back() => break,
            () = front.closing.cancelled() => break,
        }
        if front.store.version(job.tenant, job.id).await? != Some(job.version) {
            job = find(front, job.tenant, job.id, job.kind).await?;
        }
    }
    Ok(job)
}

/// How a row is told from its other versions. The place in the queue moves without the row.
fn etag(job: &Job, queue_position: Option<u64>) -> String {
    format!("W/\"{}\"", version(job, queue_position))
}

/// The same, for events.
pub(super) fn version(job: &Job, queue_position: Option<u64>) -> String {
    match queue_position {
        Some(place) => format!("{}-{place}", job.version),
        None => job.version.to_string(),
    }
}

/// Whether the client has what `etag` stands for.
fn has(headers: &HeaderMap, etag: &str) -> bool {
    let all = headers.get_all(header::IF_NONE_MATCH).iter().filter_map(|value| value.to_str().ok());
    let bare = |tag: &str| tag.trim().trim_start_matches("W/").to_owned();
    all.flat_map(|value| value.split(',')).any(|tag| tag.trim() == "*" || bare(tag) == bare(etag))
}

/// One row as an answer: its version, and when to look again.
pub(super) fn row(
    headers: &HeaderMap,
    job: &Job,
    queue_position: Option<u64>,
    body: impl Serialize,
) -> Response {
    let etag = etag(job, queue_position);
    let mut response = if has(headers, &etag) {
        StatusCode::NOT_MODIFIED.into_response()
    } else {
        Json(body).into_response()
    };
    let headers = response.headers_mut();
    if let Ok(etag) = HeaderValue::from_str(&etag) {
        headers.insert(header::ETAG, etag);
    }
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("private, no-cache"));
    if !job.state.is_terminal() {
        headers.insert(header::RETRY_AFTER, HeaderValue::from(RETRY_AFTER_SECS));
    }
    response
}

/// A URL to an object, and until when it works.
pub(super) async fn signed(front: &Front, object: &Object) -> Result<(String, String), Problem> {
    let (now, life) = (Timestamp::now(), front.settings.url_time);
    let url = front.blobs.sign(object, life, now).await?;
    let expires_ms = now.as_millisecond().saturating_add_unsigned(life.as_millis() as u64);
    Ok((url, time(expires_ms)))
}

/// Sends the client to an object.
pub(super) async fn redirect(front: &Front, object: &Object) -> Result<Response, Problem> {
    let (url, _) = signed(front, object).await?;
    let location = HeaderValue::from_str(&url).map_err(|error| Problem::internal(&error))?;
    Ok((StatusCode::TEMPORARY_REDIRECT, [(header::LOCATION, location)]).into_response())
}
