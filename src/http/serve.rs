//! The accept loop: connections in, responses out, and nobody holds one for nothing.
//!
//! Our own, since axum's has no time limit for headers. What ends a connection: no whole request head in
//! [`Patience::head`], no byte taken of a response for [`Patience::stall`], no request for [`Patience::idle`], and the
//! end of the server: then requests in flight may take [`Patience::drain`], and no more. When all places are taken, a new
//! connection takes that of the one that has been without a request longest: what nobody uses, nobody holds.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::connection::{Connection, Patience, Used};

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
