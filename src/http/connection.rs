//! One connection: serves its requests, and ends it when a time limit is over.

use std::convert::Infallible;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderValue, header};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, Sleep, interval, sleep};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use super::activity::Activity;

/// Time limits of a connection.
#[derive(Clone, Debug)]
pub struct Timeouts {
    /// For the whole head of a request, before its first byte too.
    pub head: Duration,
    /// For the client to take the next byte of a response.
    pub stall: Duration,
    /// Without a request.
    pub idle: Duration,
    /// For requests in flight when the server ends.
    pub drain: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        let secs = Duration::from_secs;
        Self { head: secs(10), stall: secs(60), idle: secs(75), drain: secs(25) }
    }
}

/// A connection and what it needs.
pub(super) struct Connection {
    pub(super) router: Router,
    pub(super) builder: Arc<auto::Builder<TokioExecutor>>,
    pub(super) timeouts: Timeouts,
    pub(super) closing: CancellationToken,
    pub(super) usage: Arc<Usage>,
    pub(super) _permit: OwnedSemaphorePermit,
}

impl Connection {
    pub(super) async fn serve(self, stream: TcpStream) {
        let _ = stream.set_nodelay(true);
        let usage = self.usage;
        let (router, closing, request_usage) = (self.router, self.closing.clone(), usage.clone());
        let service = service_fn(move |mut request: hyper::Request<Incoming>| {
            let in_flight = InFlight::begin(request_usage.clone());
            request.extensions_mut().insert(Abort(request_usage.abort.clone()));
            let response = router.clone().oneshot(request.map(Body::new));
            let closing = closing.clone();
            async move {
                let mut response = response.await?;
                if closing.is_cancelled() {
                    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
                }
                // A request is in flight until the last byte of its response.
                Ok::<_, Infallible>(
                    response.map(|body| Body::new(InFlightBody { body, _in_flight: in_flight })),
                )
            }
        });
        let io = TokioIo::new(StallTimeout { stream, limit: self.timeouts.stall, deadline: None });
        let mut connection = pin!(self.builder.serve_connection(io, service));
        // One accepted while the server ends is closed after its response: after a graceful shutdown hyper would not
        // even read its request.
        let mut ending = self.closing.is_cancelled();
        let mut idle = IdleTime::default();
        let mut check = interval(self.timeouts.head);
        check.tick().await; // the first comes at once
        loop {
            tokio::select! {
                _ = connection.as_mut() => return, // an error is the peer's, and nobody is left to tell
                () = self.closing.cancelled(), if !ending => {
                    ending = true;
                    connection.as_mut().graceful_shutdown();
                }
                () = usage.abort.cancelled() => return,
                () = usage.evicted.cancelled(), if !ending => {
                    if usage.n_in_flight.load(Ordering::Relaxed) == 0 {
                        return;
                    }
                    ending = true; // a request came at this moment
                    connection.as_mut().graceful_shutdown();
                }
                now = check.tick() => {
                    if usage.n_requests.load(Ordering::Relaxed) == 0 {
                        return; // hyper does not count the time before a request's first byte
                    }
                    if !ending && idle.measure(&usage, now) >= self.timeouts.idle {
                        ending = true;
                        connection.as_mut().graceful_shutdown();
                    }
                }
            }
        }
    }
}

/// How long a connection has had no request.
#[derive(Default)]
struct IdleTime {
    n_requests: usize,
    since: Option<Instant>,
}

impl IdleTime {
    fn measure(&mut self, usage: &Usage, now: Instant) -> Duration {
        let n_requests = usage.n_requests.load(Ordering::Relaxed);
        if usage.n_in_flight.load(Ordering::Relaxed) > 0 || n_requests != self.n_requests {
            *self = Self { n_requests, since: None };
            return Duration::ZERO;
        }
        now - *self.since.get_or_insert(now)
    }
}

/// The requests of a connection, and how it is told to end.
#[derive(Default)]
pub(super) struct Usage {
    /// So far.
    n_requests: AtomicUsize,
    n_in_flight: AtomicUsize,
    pub(super) activity: Activity,
    /// Another connection needs its permit, and it has no request.
    pub(super) evicted: CancellationToken,
    abort: CancellationToken,
}

impl Usage {
    /// Whether the connection has no request and is not evicted yet.
    pub(super) fn is_evictable(&self) -> bool {
        self.n_in_flight.load(Ordering::Relaxed) == 0 && !self.evicted.is_cancelled()
    }
}

/// Closes the connection of a request at once.
#[derive(Clone)]
pub(super) struct Abort(pub(super) CancellationToken);

/// A request in flight.
struct InFlight(Arc<Usage>);

impl InFlight {
    fn begin(usage: Arc<Usage>) -> Self {
        usage.n_requests.fetch_add(1, Ordering::Relaxed);
        usage.n_in_flight.fetch_add(1, Ordering::Relaxed);
        Self(usage)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.activity.touch();
        self.0.n_in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A response's body, which keeps its request in flight.
struct InFlightBody {
    body: Body,
    _in_flight: InFlight,
}

impl hyper::body::Body for InFlightBody {
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

/// A stream whose writes fail when the peer takes nothing for `limit`.
struct StallTimeout {
    stream: TcpStream,
    limit: Duration,
    deadline: Option<Pin<Box<Sleep>>>,
}

impl StallTimeout {
    fn check<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.deadline = None;
            return written;
        }
        let deadline = self.deadline.get_or_insert_with(|| Box::pin(sleep(self.limit)));
        deadline.as_mut().poll(cx).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for StallTimeout {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for StallTimeout {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.check(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.check(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.check(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
