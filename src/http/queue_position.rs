//! The place in the queue of a job that a client watches.
//!
//! A place changes without the job's row, as other jobs are claimed, so it has to be queried. The query takes longer
//! the more jobs wait, so all watches together spend at most a tenth of the time on it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use crate::job::{Job, State};
use crate::store::{self, QueuePlace, Store};

/// Shortest time between two queries of one watch.
const INTERVAL_MIN: Duration = Duration::from_secs(2);
/// All watches together query for one part in this many of the time.
const LOAD_DIVISOR: u32 = 10;

/// The positions that are watched now. Clones are one.
#[derive(Clone)]
pub(super) struct QueuePositions(Arc<Shared>);

struct Shared {
    store: Store,
    n_watches: AtomicUsize,
    /// Duration of the last query, in microseconds.
    query_micros: AtomicU64,
}

impl QueuePositions {
    /// No watches yet.
    pub(super) fn new(store: Store) -> Self {
        Self(Arc::new(Shared { store, n_watches: AtomicUsize::new(0), query_micros: AtomicU64::new(0) }))
    }

    /// Starts a watch; `known` is the position as it was just queried, if it was.
    pub(super) fn watch(&self, known: Option<QueuePlace>) -> PositionWatch {
        self.0.n_watches.fetch_add(1, Ordering::Relaxed);
        let queried_at = known.map(|_| Instant::now());
        PositionWatch { shared: Arc::clone(&self.0), last: known, queried_at }
    }
}

impl Shared {
    /// Time between two queries of one watch.
    fn interval(&self) -> Duration {
        let query = Duration::from_micros(self.query_micros.load(Ordering::Relaxed)) * LOAD_DIVISOR;
        INTERVAL_MIN.max(query.saturating_mul(self.n_watches.load(Ordering::Relaxed) as u32))
    }
}

/// One watch of a job's queue position; ends when dropped.
pub(super) struct PositionWatch {
    shared: Arc<Shared>,
    last: Option<QueuePlace>,
    queried_at: Option<Instant>,
}

impl PositionWatch {
    /// The job's position, queried now or a moment ago; none unless the job is queued.
    pub(super) async fn get(&mut self, job: &Job) -> store::Result<Option<QueuePlace>> {
        if job.state != State::Queued {
            self.last = None;
        } else if self.queried_at.is_none_or(|at| at.elapsed() >= self.shared.interval()) {
            let started = Instant::now();
            // A job without a position has just left the queue; its next version will show that.
            self.last = self.shared.store.queue_place(job).await?.or(self.last);
            self.queried_at = Some(Instant::now());
            self.shared.query_micros.store(started.elapsed().as_micros() as u64, Ordering::Relaxed);
        }
        Ok(self.last)
    }
}

impl Drop for PositionWatch {
    fn drop(&mut self) {
        self.shared.n_watches.fetch_sub(1, Ordering::Relaxed);
    }
}
