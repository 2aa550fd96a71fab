//! The leases that a worker holds, and the heart that keeps them.
//!
//! The heart is a thread with a runtime and a connection of its own: a device that computes, or a server full of requests,
//! must not look like a dead machine. A lease counts as held only until the time that the database last confirmed, less
//! a margin, by our own monotonic clock, begun before the question was sent: whoever cannot ask stops in time.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::shares::Meter;
use crate::clock;
use crate::job::{Lease, Progress};
use crate::store::{Renewal, Store};

/// One lease that is held, seen from the device's thread, the job's task and the heart.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) lease: Lease,
    length: Duration,
    confirmed: Mutex<Instant>,
    lost: AtomicBool,
    cancel: AtomicBool,
    progress: Mutex<Option<Progress>>,
    /// What the job has used of the device.
    pub(super) meter: Arc<Meter>,
}

impl Held {
    fn new(lease: Lease, length: Duration, asked: Instant) -> Self {
        let (lost, cancel) = (AtomicBool::new(false), AtomicBool::new(false));
        let (confirmed, progress) = (Mutex::new(asked), Mutex::new(None));
        Self { lease, length, confirmed, lost, cancel, progress, meter: Arc::default() }
    }

    /// Whether the lease is gone, or may be.
    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire) || self.left().is_zero()
    }

    /// How long the lease is surely held; a tenth of it is kept as a margin.
    pub(super) fn left(&self) -> Duration {
        let safe = self.length.mul_f64(0.9);
        safe.saturating_sub(clock::since(*lock(&self.confirmed)))
    }

    /// Whether the job's owner wants it to end.
    pub(super) fn is_canceled(&self) -> bool {
        self.cancel.load(Ordering::Acquire)
    }

    /// Says how far the job is; the next beat writes it down.
    pub(super) fn progress(&self, progress: Progress) {
        *lock(&self.progress) = Some(progress);
    }

    /// Says how many pictures can be looked at.
    pub(super) fn images(&self, n: u64) {
        if let Some(progress) = lock(&self.progress).as_mut() {
            progress.images = n;
        }
    }

    /// Notes that a write was refused.
    pub(super) fn lose(&self) {
        self.lost.store(true, Ordering::Release);
    }
}

/// Renews every lease of this process.
#[derive(Clone, Debug)]
pub struct Heart {
    held: Arc<Mutex<BTreeMap<Lease, Arc<Held>>>>,
    length: Duration,
}

impl Heart {
    /// One for leases of this length. It does not beat yet.
    pub fn new(length: Duration) -> Self {
        Self { held: Arc::default(), length }
    }

    /// Starts beating every `beat`, in a thread and on a connection of its own, until `stop`.
    pub(super) fn start(&self, url: &str, beat: Duration, stop: CancellationToken) -> std::io::Result<()> {
        let (beating, url) = (self.clone(), url.to_owned());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let run = move || runtime.block_on(beating.run(async || Store::connect(&url, 1).await, beat, stop));
        std::thread::Builder::new().name("heart".into()).spawn(run)?;
        Ok(())
    }

    /// Keeps `lease`, claimed by a question sent at `asked`, until the guard is dropped.
    pub(super) fn hold(&self, lease: Lease, asked: Instant) -> Holding {
        let held = Arc::new(Held::new(lease, self.length, asked));
        lock(&self.held).insert(lease, held.clone());
        Holding { heart: self.clone(), held }
    }

    /// Beats every `beat` until `stop`, on the connection that `connect` makes.
    pub async fn run(
        self,
        connect: impl AsyncFn() -> crate::store::Result<Store>,
        beat: Duration,
        stop: CancellationToken,
    ) {
        let mut store = None;
        let mut away = false;
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = clock::sleep(beat) => {}
            }
            let held: Vec<Arc<Held>> = lock(&self.held).values().cloned().collect();
            if held.is_empty() {
                continue;
            }
            match self.beat(&mut store, &connect, &held).await {
                Ok(()) => away = false,
                Err(error) if !away => {
                    away = true; // said once, until it is back
                    warn!("leases cannot be renewed: {error}");
                }
                Err(_) => {}
            }
        }
    }

    async fn beat(
        &self,
        store: &mut Option<Store>,
        connect: &impl AsyncFn() -> crate::store::Result<Store>,
        held: &[Arc<Held>],
    ) -> crate::store::Result<()> {
        if store.is_none() {
            *store = Some(connect().await?);
        }
        let Some(store) = store else { return Ok(()) };
        let mut failed = None;
        for one in held {
            let asked = clock::now();
            let progress = lock(&one.progress).clone();
            match store.renew(one.lease, self.length, progress.as_ref()).await {
                Ok(Renewal::Held { cancel_requested }) => {
                    *lock(&one.confirmed) = asked;
                    one.cancel.store(cancel_requested, Ordering::Release);
                }
                Ok(Renewal::Lost) => one.lose(),
                Err(error) => failed = Some(error), // a row that is locked does not cost the others their leases
            }
        }
        failed.map_or(Ok(()), Err)
    }
}

/// A lease for as long as this lives.
#[derive(Debug)]
pub(super) struct Holding {
    heart: Heart,
    pub(super) held: Arc<Held>,
}

impl Drop for Holding {
    fn drop(&mut self) {
        lock(&self.heart.held).remove(&self.held.lease);
        self.held.lose(); // the device may still be at it, if the job's task did not come to its end
    }
}

/// What a panic elsewhere left behind is whole all the same.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
