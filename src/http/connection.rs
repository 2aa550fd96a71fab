//! One connection: its requests one after the other, and what ends it.

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

use super::activity::Life;

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

/// What a connection needs.
pub(super) struct Connection {
    pub(super) router: Router,
    pub(super) builder: Arc<auto::Builder<TokioExecutor>>,
    pub(super) patience: Patience,
    pub(super) closing: CancellationToken,
    pub(super) used: Arc<Used>,
    pub(super) _place: OwnedSemaphorePermit,
}

impl Connection {
    pub(super) async fn serve(self, stream: TcpStream) {
        let _ = stream.set_nodelay(true);
        let used = self.used;
        let (router, closing, seen) = (self.router, self.closing.clone(), used.clone());
        let service = service_fn(move |mut request: hyper::Request<Incoming>| {
            let in_flight = InFlight::begin(seen.clone());
            request.extensions_mut().insert(HangUp(seen.hang_up.clone()));
            let response = router.clone().oneshot(request.map(Body::new));
            let closing = closing.clone();
            async move {
                let mut response = response.await?;
                if closing.is_cancelled() {
                    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
                }
                // A request is in flight until the last byte of its answer.
                Ok::<_, Infallible>(response.map(|body| Body::new(Held { body, _in_flight: in_flight })))
            }
        });
        let io = TokioIo::new(Stalling { stream, patience: self.patience.stall, stalled: None });
        let mut connection = pin!(self.builder.serve_connection(io, service));
        // One that comes while the server ends is asked to end by its answer: hyper would not even read its request.
        let mut ending = self.closing.is_cancelled();
        let mut quiet = Quiet::default();
        let mut look = interval(self.patience.head);
        look.tick().await; // the first comes at once
        loop {
            tokio::select! {
                _ = connection.as_mut() => return, // a peer's fault; there is nobody to tell
                () = self.closing.cancelled(), if !ending => {
                    ending = true;
                    connection.as_mut().graceful_shutdown();
                }
                () = used.hang_up.cancelled() => return,
                () = used.unneeded.cancelled(), if !ending => {
                    if used.in_flight.load(Ordering::Relaxed) == 0 {
                        return;
                    }
                    ending = true; // it was used again at this moment
                    connection.as_mut().graceful_shutdown();
                }
                now = look.tick() => {
                    if used.begun.load(Ordering::Relaxed) == 0 {
                        return; // hyper does not count the time before a request's first byte
                    }
                    if !ending && quiet.since(&used, now) >= self.patience.idle {
                        ending = true;
                        connection.as_mut().graceful_shutdown();
                    }
                }
            }
        }
    }
}

/// How long there has been no request.
#[derive(Default)]
struct Quiet {
    begun: usize,
    since: Option<Instant>,
}

impl Quiet {
    fn since(&mut self, used: &Used, now: Instant) -> Duration {
        let begun = used.begun.load(Ordering::Relaxed);
        if used.in_flight.load(Ordering::Relaxed) > 0 || begun != self.begun {
            *self = Self { begun, since: None };
            return Duration::ZERO;
        }
        now - *self.since.get_or_insert(now)
    }
}

/// What a connection is used for, and how it is told to end.
#[derive(Default)]
pub(super) struct Used {
    begun: AtomicUsize,
    pub(super) in_flight: AtomicUsize,
    pub(super) life: Life,
    /// Another needs its place, and it has no request.
    pub(super) unneeded: CancellationToken,
    hang_up: CancellationToken,
}

/// Ends the connection that a request came by, whatever it is at.
#[derive(Clone)]
pub(super) struct HangUp(pub(super) CancellationToken);

struct InFlight(Arc<Used>);

impl InFlight {
    fn begin(used: Arc<Used>) -> Self {
        used.begun.fetch_add(1, Ordering::Relaxed);
        used.in_flight.fetch_add(1, Ordering::Relaxed);
        Self(used)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.life.sign();
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
