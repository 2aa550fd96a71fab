//! Lingering close: keeps reading what a refused client still sends.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::http::header;
use axum::middleware::Next;
use axum::response::Response;
use futures_util::StreamExt;
use tokio::time::Instant;

const LINGER: Duration = Duration::from_secs(10);
const LINGER_BYTES_MAX: usize = 512 << 20; // the largest upload that can be configured
/// A client with `Expect: 100-continue` waits at least this long before it sends its body.
const CONTINUE_WAIT: Duration = Duration::from_millis(500);

/// Reads and discards the rest of a refused request's body for a while. Otherwise the connection would be reset while
/// the client still sends, and the response would be lost.
pub(super) async fn linger(request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    let (expects_continue, started) = (parts.headers.contains_key(header::EXPECT), Instant::now());
    let reclaimable = ReclaimableBody(Arc::new(Mutex::new(Inner { body, polled: false })));
    let response = next.run(Request::from_parts(parts, Body::new(reclaimable.clone()))).await;
    if response.status().is_client_error() || response.status().is_server_error() {
        let Inner { body, polled } = std::mem::take(&mut *reclaimable.lock());
        // A client with `Expect: 100-continue` that is refused soon enough has not begun to send.
        let is_sending = polled || !expects_continue || started.elapsed() > CONTINUE_WAIT;
        if is_sending && !body.is_end_stream() {
            tokio::spawn(tokio::time::timeout(LINGER, drain(body)));
        }
    }
    response
}

async fn drain(body: Body) {
    let mut stream = body.into_data_stream();
    let mut bytes_left = LINGER_BYTES_MAX;
    while let Some(Ok(chunk)) = stream.next().await {
        let Some(left) = bytes_left.checked_sub(chunk.len()) else { break };
        bytes_left = left;
    }
}

/// A body that can be taken back from its reader.
#[derive(Clone)]
struct ReclaimableBody(Arc<Mutex<Inner>>);

/// The body, and whether anything was read of it.
#[derive(Default)]
struct Inner {
    body: Body,
    polled: bool,
}

impl ReclaimableBody {
    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl HttpBody for ReclaimableBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<hyper::body::Frame<Bytes>, axum::Error>>> {
        let mut inner = self.lock();
        inner.polled = true;
        Pin::new(&mut inner.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.lock().body.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.lock().body.size_hint()
    }
}
