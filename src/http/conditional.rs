//! Conditional requests: versions of a row as `ETag`, and `If-None-Match`.

use axum::Json;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::job::Job;

/// What a client that polls is asked to leave between two looks, in seconds.
pub(super) const POLL_AFTER_SECS: u64 = 5;

/// How a row is told from its other versions. The place in the queue moves without the row.
pub(super) fn etag(job: &Job, queue_position: Option<u64>) -> String {
    format!("W/\"{}\"", version_tag(job, queue_position))
}

/// The same, for events.
pub(super) fn version_tag(job: &Job, queue_position: Option<u64>) -> String {
    match queue_position {
        Some(queue_position) => format!("{}-{queue_position}", job.version),
        None => job.version.to_string(),
    }
}

/// Whether the client has what `etag` stands for.
pub(super) fn matches_etag(headers: &HeaderMap, etag: &str) -> bool {
    let all = headers.get_all(header::IF_NONE_MATCH).iter().filter_map(|value| value.to_str().ok());
    let opaque = |tag: &str| tag.trim().trim_start_matches("W/").to_owned();
    all.flat_map(|value| value.split(',')).any(|tag| tag.trim() == "*" || opaque(tag) == opaque(etag))
}

/// One row as an answer: its version, and when to look again.
pub(super) fn conditional_json(
    headers: &HeaderMap,
    job: &Job,
    queue_position: Option<u64>,
    body: impl Serialize,
) -> Response {
    let etag = etag(job, queue_position);
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
