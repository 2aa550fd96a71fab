//! Request bodies, bounded in size and time.

use std::time::Duration;

use axum::body::{Body, BodyDataStream, Bytes};
use axum::http::{HeaderMap, header};
use futures_util::StreamExt;
use tokio::time::Instant;

use super::activity::Activity;
use super::problem::{Kind, Problem};

/// A body that fails when it is larger or slower than allowed.
pub(super) struct LimitedBody {
    stream: BodyDataStream,
    bytes_max: usize,
    bytes_left: usize,
    time: Duration,
    deadline: Option<Instant>,
    activity: Activity,
}

impl LimitedBody {
    /// Refuses at once a body with a Content-Encoding, and one whose Content-Length is larger than `bytes_max`. `time`
    /// counts from the first read.
    pub(super) fn new(
        headers: &HeaderMap,
        body: Body,
        bytes_max: usize,
        time: Duration,
    ) -> Result<Self, Problem> {
        // A small body could decompress to a large one.
        if headers.get(header::CONTENT_ENCODING).is_some_and(|encoding| encoding != "identity") {
            return Err(Problem::new(Kind::MediaType, "a body must come without Content-Encoding"));
        }
        if content_length(headers).is_some_and(|bytes| bytes > bytes_max as u64) {
            return Err(too_large(bytes_max));
        }
        let stream = body.into_data_stream();
        Ok(Self { stream, bytes_max, bytes_left: bytes_max, time, deadline: None, activity: Activity::new() })
    }

    /// From now on every received chunk touches `activity`.
    pub(super) fn report_to(&mut self, activity: Activity) {
        self.activity = activity;
    }

    /// The next chunk; none at the end.
    pub(super) async fn next_chunk(&mut self) -> Result<Option<Bytes>, Problem> {
        let deadline = *self.deadline.get_or_insert_with(|| Instant::now() + self.time);
        let next = tokio::time::timeout_at(deadline, self.stream.next()).await;
        let Ok(next) = next else {
            return Err(Problem::new(Kind::BodyTimeout, "the body was not received in time"));
        };
        self.activity.touch();
        let Some(chunk) = next else { return Ok(None) };
        let Ok(chunk) = chunk else {
            return Err(Problem::new(Kind::BadBody, "the connection was closed before the end of the body"));
        };
        let left = self.bytes_left.checked_sub(chunk.len());
        self.bytes_left = left.ok_or_else(|| too_large(self.bytes_max))?;
        Ok(Some(chunk))
    }
}

/// The Content-Length, in bytes.
pub(super) fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

fn too_large(bytes_max: usize) -> Problem {
    Problem::new(Kind::BodyTooLarge, format!("the body may have at most {bytes_max} bytes"))
}

/// The media type of a body, in lower case and without parameters, and the whole header.
pub(super) fn media_type(headers: &HeaderMap) -> Option<(String, &str)> {
    let whole = headers.get(header::CONTENT_TYPE)?.to_str().ok()?;
    let essence = whole.split(';').next().unwrap_or_default();
    Some((essence.trim().to_ascii_lowercase(), whole))
}
