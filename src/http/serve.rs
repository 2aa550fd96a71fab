//! The accept loop: connections in, responses out, and nobody holds one for nothing.
//!
//! Our own, since axum's has no time limit for headers. What ends a connection: no whole request head in
//! [`Patience::head`], no byte taken of a response for [`Patience::stall`], no request for [`Patience::idle`], and the
//! end of the server: then requests in flight may take [`Patience::drain`], and no more. When all places are taken, a new
//! connection takes that of the one that has been without a request longest: what nobody uses, nobody holds.

use std::convert::Infallible;
use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderValue, header};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt;

use super::shares::Life;

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
/// A connection that was used a moment ago is not ended for a new one.
const QUIET_MIN: Duration = Duration::from_millis(500);

/// Serves until `closing`, then lets what is in flight finish. Meanwhile new connections are still taken, for one request
/// each: whoever asks whether the server is ready hears that it is not.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    connections_max: usize,
    patience: Patience,
    closing: CancellationToken,
) {
    let server = Server {
        places: Arc::new(Semaphore::new(connections_max)),
        open: Open::default(),
        connections: TaskTracker::new(),
        builder: Arc::new(builder(&patience)),
        listener,
        router,
        patience,
        closing,
    };
    server.closing.run_until_cancelled(server.accept()).await;
    server.connections.close();
    let drained = async {
        tokio::select! {
            () = server.connections.wait() => {}
            () = server.accept() => {}
        }
    };
    if timeout(server.patience.drain, drained).await.is_err() {
        tracing::warn!(connections = server.connections.len(), "closed before their requests were done");
    }
}

struct Server {
    places: Arc<Semaphore>,
    open: Open,
    connections: TaskTracker,
    builder: Arc<auto::Builder<TokioExecutor>>,
    listener: TcpListener,
    router: Router,
    patience: Patience,
    closing: CancellationToken,
}

impl Server {
    /// Takes connections for ever. One beyond the last place waits until one is free, and those after it in the system's
    /// queue.
    async fn accept(&self) {
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let Some(place) = self.place().await else { return };
                    let used = self.open.begin();
                    let connection = Connection {
                        router: self.router.clone(),
                        builder: self.builder.clone(),
                        patience: self.patience.clone(),
                        closing: self.closing.clone(),
                        used,
                        _place: place,
                    };
                    self.connections.spawn(connection.serve(stream));
                }
                Err(error) => {
                    self.open.end_quietest(); // most likely there is no descriptor left
                    rest_after(&error).await;
                }
            }
        }
    }

    async fn place(&self) -> Option<OwnedSemaphorePermit> {
        loop {
            let place = self.places.clone().acquire_owned();
            match timeout(Duration::ZERO, place).await {
                Ok(place) => return place.ok(),
                Err(_) => self.open.end_quietest(),
            }
            if let Ok(place) = timeout(QUIET_MIN, self.places.clone().acquire_owned()).await {
                return place.ok();
            }
        }
    }
}

/// The connections that are open.
#[derive(Default)]
struct Open(Mutex<Vec<Weak<Used>>>);

impl Open {
    fn lock(&self) -> MutexGuard<'_, Vec<Weak<Used>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self) -> Arc<Used> {
        let used = Arc::new(Used::default());
        let mut open = self.lock();
        if open.len() == open.capacity() {
            open.retain(|used| used.strong_count() > 0);
        }
        open.push(Arc::downgrade(&used));
        used
    }

    /// Ends the connection that has been without a request longest, if there is one that has been for a moment.
    fn end_quietest(&self) {
        let open = self.lock();
        let quiet = open.iter().filter_map(Weak::upgrade);
        let quiet =
            quiet.filter(|used| used.in_flight.load(Ordering::Relaxed) == 0 && !used.unneeded.is_cancelled());
        let quietest = quiet.max_by_key(|used| used.life.silence());
        if let Some(used) = quietest.filter(|used| used.life.silence() >= QUIET_MIN) {
            used.unneeded.cancel();
        }
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

/// What a connection needs.
struct Connection {
    router: Router,
    builder: Arc<auto::Builder<TokioExecutor>>,
    patience: Patience,
    closing: CancellationToken,
    used: Arc<Used>,
    _place: OwnedSemaphorePermit,
}

impl Connection {
    async fn serve(self, stream: TcpStream) {
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
struct Used {
    begun: AtomicUsize,
    in_flight: AtomicUsize,
    life: Life,
    /// Another needs its place, and it has no request.
    unneeded: CancellationToken,
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
