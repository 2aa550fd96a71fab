//! The accept loop: takes connections, serves them, and ends them within time limits.
//!
//! Our own, since axum's has no time limit for request headers. When all permits are taken, a new connection takes that
//! of the one that has been idle longest; see [`Connection`] for the time limits.

use std::io;
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

use super::connection::{Connection, Timeouts, Usage};

const HEADERS_MAX: usize = 100;
const HEAD_BYTES_MAX: usize = 64 * 1024;
const STREAMS_MAX: u32 = 100;
/// A connection that was used more recently is not closed for a new one.
const IDLE_MIN: Duration = Duration::from_millis(500);

/// Serves until `closing`, then lets requests in flight finish. Meanwhile new connections are still accepted, for one
/// request each, so that readiness checks are answered.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    connections_max: usize,
    timeouts: Timeouts,
    closing: CancellationToken,
) {
    let server = Server {
        permits: Arc::new(Semaphore::new(connections_max)),
        open: OpenConnections::default(),
        connections: TaskTracker::new(),
        builder: Arc::new(builder(&timeouts)),
        listener,
        router,
        timeouts,
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
    if timeout(server.timeouts.drain, drained).await.is_err() {
        let connections = server.connections.len();
        tracing::warn!(connections, "drain time is over: connections closed before their requests were done");
    }
}

struct Server {
    permits: Arc<Semaphore>,
    open: OpenConnections,
    connections: TaskTracker,
    builder: Arc<auto::Builder<TokioExecutor>>,
    listener: TcpListener,
    router: Router,
    timeouts: Timeouts,
    closing: CancellationToken,
}

impl Server {
    /// Accepts connections for ever. One beyond the last permit waits until one is free, and those after it in the
    /// system's backlog.
    async fn accept(&self) {
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let Some(permit) = self.permit().await else { return };
                    let usage = self.open.register();
                    let connection = Connection {
                        router: self.router.clone(),
                        builder: self.builder.clone(),
                        timeouts: self.timeouts.clone(),
                        closing: self.closing.clone(),
                        usage,
                        _permit: permit,
                    };
                    self.connections.spawn(connection.serve(stream));
                }
                Err(error) => {
                    self.open.close_idlest(); // most likely there is no file descriptor left
                    back_off(&error).await;
                }
            }
        }
    }

    async fn permit(&self) -> Option<OwnedSemaphorePermit> {
        loop {
            let permit = self.permits.clone().acquire_owned();
            match timeout(Duration::ZERO, permit).await {
                Ok(permit) => return permit.ok(),
                Err(_) => self.open.close_idlest(),
            }
            if let Ok(permit) = timeout(IDLE_MIN, self.permits.clone().acquire_owned()).await {
                return permit.ok();
            }
        }
    }
}

/// The connections that are open.
#[derive(Default)]
struct OpenConnections(Mutex<Vec<Weak<Usage>>>);

impl OpenConnections {
    fn lock(&self) -> MutexGuard<'_, Vec<Weak<Usage>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The usage of a new connection.
    fn register(&self) -> Arc<Usage> {
        let usage = Arc::new(Usage::default());
        let mut open = self.lock();
        if open.len() == open.capacity() {
            open.retain(|usage| usage.strong_count() > 0);
        }
        open.push(Arc::downgrade(&usage));
        usage
    }

    /// Closes the connection that has been idle longest, if one has been for [`IDLE_MIN`].
    fn close_idlest(&self) {
        let open = self.lock();
        let idle = open.iter().filter_map(Weak::upgrade).filter(|usage| usage.is_evictable());
        let idlest = idle.max_by_key(|usage| usage.activity.idle());
        if let Some(usage) = idlest.filter(|usage| usage.activity.idle() >= IDLE_MIN) {
            usage.evicted.cancel();
        }
    }
}

fn builder(timeouts: &Timeouts) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(timeouts.head)
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

/// Waits before the next try to accept, unless the peer is at fault. With no file descriptor left the loop would spin.
async fn back_off(error: &io::Error) {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    if !matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted) {
        tracing::error!(%error, "cannot accept connections");
        sleep(Duration::from_millis(100)).await;
    }
}
