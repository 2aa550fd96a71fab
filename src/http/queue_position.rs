//! The place in the queue of a job that somebody follows.
//!
//! It moves without the job's row, as others are claimed, so that whoever follows has to ask. The answer takes longer the
//! more jobs wait; therefore all who follow ask, together, for a tenth of the time at most.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use crate::job::{Job, State};
use crate::store::{self, Store};

/// Shortest time between two questions of one who follows.
const PAUSE_MIN: Duration = Duration::from_secs(2);
/// All who follow ask for one part in so many of the time.
const SHARE: u32 = 10;

/// All who follow.
#[derive(Clone)]
pub(super) struct Positions(Arc<Followers>);

/// How many follow, and what a question costs.
struct Followers {
    store: Store,
    number: AtomicUsize,
    micros: AtomicU64,
}

impl Positions {
    pub(super) fn new(store: Store) -> Self {
        Self(Arc::new(Followers { store, number: AtomicUsize::new(0), micros: AtomicU64::new(0) }))
    }

    /// Begins with what is known.
    pub(super) fn follow(&self, known: Option<u64>) -> Position {
        self.0.number.fetch_add(1, Ordering::Relaxed);
        Position { followers: Arc::clone(&self.0), known, asked: known.map(|_| Instant::now()) }
    }
}

impl Followers {
    fn pause(&self) -> Duration {
        let all = Duration::from_micros(self.micros.load(Ordering::Relaxed)) * SHARE;
        PAUSE_MIN.max(all.saturating_mul(self.number.load(Ordering::Relaxed) as u32))
    }
}

/// One who follows a job's place in the queue.
pub(super) struct Position {
    followers: Arc<Followers>,
    known: Option<u64>,
    asked: Option<Instant>,
}

impl Position {
    /// Where the job stands, as far as is known: asked now, or a moment ago.
    pub(super) async fn of(&mut self, job: &Job) -> store::Result<Option<u64>> {
        if job.state != State::Queued {
            self.known = None;
        } else if self.asked.is_none_or(|asked| asked.elapsed() >= self.followers.pause()) {
            let began = Instant::now();
            // One that has none any more has changed, and its row will tell.
            self.known = self.followers.store.queue_position(job).await?.or(self.known);
            self.asked = Some(Instant::now());
            self.followers.micros.store(began.elapsed().as_micros() as u64, Ordering::Relaxed);
        }
        Ok(self.known)
    }
}

impl Drop for Position {
    fn drop(&mut self) {
        self.followers.number.fetch_sub(1, Ordering::Relaxed);
    }
}
