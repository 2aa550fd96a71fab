//! The accept loop: connections in, responses out, and nobody holds one for nothing.
//!
//! Our own, since axum's has no time limit for headers. What ends a connection: no whole request head in
//! [`Patience::head`], no byte taken of a response for [`Patience::stall`], no request for [`Patience::idle`], and the
//! end of the server: then requests in flight may take [`Patience::drain`], and no more.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, Sleep, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt;

/// How long a connection may take for what.
#[derive(Clone, Debug)]
pub struct Patience {
    /// To send the head of a request, its first byte included.
    pub head: Duration,
    /// To take the next byte of a response.
    pub stall: Duration,
    /// Without a request.
    pub idle: Duration,
    /// To finish what is in flight when the server ends.
    pub drain: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        let secs = Duration::from_secs;
        Self { head: secs(10), stall: secs(60), idle: secs(75), drain: secs(25) }
    }
}

const HEADERS_MAX: usize = 100;
const HEAD_BYTES_MAX: usize = 64 * 1024;
const STREAMS_MAX: u32 = 100;

/// Serves until `closing`, then lets what is in flight finish.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    connections_max: usize,
    patience: Patience,
    closing: CancellationToken,
) {
    let places = Arc::new(Semaphore::new(connections_max));
    let connections = TaskTracker::new();
    let builder = Arc::new(builder(&patience));
    // A connection beyond the last place waits in the system's queue: whoever holds a place is served first.
    while let Some(Ok(place)) = closing.run_until_cancelled(places.clone().acquire_owned()).await {
        let Some(accepted) = closing.run_until_cancelled(listener.accept()).await else { break };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                rest_after(&error).await;
                continue;
            }
        };
        let connection =
            connection(stream, router.clone(), builder.clone(), patience.clone(), closing.clone());
        connections.spawn(async move {
            connection.await;
            drop(place);
        });
    }
    drop(listener);
    connections.close();
    if timeout(patience.drain, connections.wait()).await.is_err() {
        tracing::warn!(connections = connections.len(), "closed before their requests were done");
    }
}

fn builder(patience: &Patience) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(patience.head)
        .max_headers(HEADERS_MAX)
        .max_buf_size(HEAD_BYTES_MAX);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(HEAD_BYTES_MAX as u32)
        .keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(20));
    builder
}

/// No descriptor left is no reason to end, and none to try again a million times a second. A peer that hung up before
/// it was accepted is nothing at all.
async fn rest_after(error: &io::Error) {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    if !matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted) {
        tracing::error!(%error, "no connection can be accepted");
        sleep(Duration::from_millis(100)).await;
    }
}

async fn connection(
    stream: TcpStream,
    router: Router,
    builder: Arc<auto::Builder<TokioExecutor>>,
    patience: Patience,
    closing: CancellationToken,
) {
    let _ = stream.set_nodelay(true);
    let requests = Arc::new(Requests::default());
    let service = service_fn({
        let requests = requests.clone();
        move |request: hyper::Request<hyper::body::Incoming>| {
            let in_flight = InFlight::begin(requests.clone());
            let response = router.clone().oneshot(request.map(Body::new));
            async move {
                // A response is in flight until the last byte of its body.
                response
                    .await
                    .map(|response| response.map(|body| Body::new(Held { body, _in_flight: in_flight })))
            }
        }
    });
    let io = TokioIo::new(Stalling { stream, patience: patience.stall, stalled: None });
    let mut connection = std::pin::pin!(builder.serve_connection(io, service));
    let mut ending = false;
    let mut look = Instant::now() + patience.head;
    let mut quiet_since = None;
    let mut begun = 0;
    loop {
        tokio::select! {
            _ = connection.as_mut() => return, // a peer's fault; there is nobody to tell
            () = closing.cancelled(), if !ending => {
                ending = true;
                connection.as_mut().graceful_shutdown();
            }
            () = tokio::time::sleep_until(look), if !ending => {
                let now = Instant::now();
                look = now + patience.head;
                let seen = requests.begun.load(Ordering::Relaxed);
                let busy = requests.in_flight.load(Ordering::Relaxed) > 0;
                if seen == 0 {
                    return; // not one request head: hyper does not count the time before the first byte
                }
                if busy || seen != begun {
                    begun = seen;
                    quiet_since = None;
                } else if now - *quiet_since.get_or_insert(now) >= patience.idle {
                    ending = true;
                    connection.as_mut().graceful_shutdown();
                }
            }
        }
    }
}

/// What a connection was used for.
#[derive(Default)]
struct Requests {
    begun: AtomicUsize,
    in_flight: AtomicUsize,
}

struct InFlight(Arc<Requests>);

impl InFlight {
    fn begin(requests: Arc<Requests>) -> Self {
        requests.begun.fetch_add(1, Ordering::Relaxed);
        requests.in_flight.fetch_add(1, Ordering::Relaxed);
        Self(requests)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A response's body, which keeps its request in flight.
struct Held {
    body: Body,
    _in_flight: InFlight,
}

impl hyper::body::Body for Held {
    type Data = bytes::Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<hyper::body::Frame<bytes::Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.body.size_hint()
    }
}

/// A connection whose peer must take what is written to it within some time.
struct Stalling {
    stream: TcpStream,
    patience: Duration,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl Stalling {
    fn watched<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep(self.patience)));
        stalled.as_mut().poll(cx).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Stalling {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Stalling {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.watched(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.watched(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.watched(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
