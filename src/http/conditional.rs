//! Conditional requests: a job's version as `ETag`, compared with `If-None-Match`.

use axum::Json;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::job::Job;
use crate::store::QueuePlace;

/// `Retry-After` of a job that has not ended, in seconds.
pub(super) const POLL_AFTER_SECS: u64 = 5;

/// The `ETag` of a job. It covers the place in the queue, which changes without the row.
pub(super) fn etag(job: &Job, place: Option<QueuePlace>) -> String {
    format!("W/\"{}\"", version_tag(job, place))
}

/// The version in an `ETag`; also the id of an event.
pub(super) fn version_tag(job: &Job, place: Option<QueuePlace>) -> String {
    match place {
        Some(QueuePlace { position, served: true }) => format!("{}-{position}", job.version),
        Some(QueuePlace { position, served: false }) => format!("{}-{position}-no-worker", job.version),
        None => job.version.to_string(),
    }
}

/// Whether `If-None-Match` holds `etag`.
pub(super) fn matches_etag(headers: &HeaderMap, etag: &str) -> bool {
    let all = headers.get_all(header::IF_NONE_MATCH).iter().filter_map(|value| value.to_str().ok());
    let opaque = |tag: &str| tag.trim().trim_start_matches("W/").to_owned();
    all.flat_map(|value| value.split(',')).any(|tag| tag.trim() == "*" || opaque(tag) == opaque(etag))
}

/// A job's representation with its `ETag`, or 304; with `Retry-After` until the job has ended.
pub(super) fn conditional_json(
    headers: &HeaderMap,
    job: &Job,
    place: Option<QueuePlace>,
    body: impl Serialize,
) -> Response {
    let etag = etag(job, place);
    let mut response = if matches_etag(headers, &etag) {
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
        headers.insert(header::RETRY_AFTER, HeaderValue::from(POLL_AFTER_SECS));
    }
    response
}
