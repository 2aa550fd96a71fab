//! The leases that a worker holds, and the keeper that renews them.
//!
//! [`LeaseKeeper`] runs on its own thread, runtime and database connection, so that a computing device or a server full
//! of requests does not look like a dead machine. A lease counts as held only until the last confirmed renewal plus its
//! length, less a margin, measured by the local monotonic clock from before the renewal was sent: a worker that cannot
//! reach the database stops in time.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::shares::DeviceTime;
use crate::clock;
use crate::job::{Lease, Progress};
use crate::store::{Renewal, Store};

/// One held lease, shared by the device's thread, the job's task and the keeper.
#[derive(Debug)]
pub(super) struct LeaseHandle {
    pub(super) lease: Lease,
    length: Duration,
    confirmed: Mutex<Instant>,
    lost: AtomicBool,
    cancel: AtomicBool,
    progress: Mutex<Option<Progress>>,
    /// Device time that the job has used in this attempt.
    pub(super) device_time: Arc<DeviceTime>,
}

impl LeaseHandle {
    fn new(lease: Lease, length: Duration, requested: Instant) -> Self {
        let (lost, cancel) = (AtomicBool::new(false), AtomicBool::new(false));
        let (confirmed, progress) = (Mutex::new(requested), Mutex::new(None));
        Self { lease, length, confirmed, lost, cancel, progress, device_time: Arc::default() }
    }

    /// Whether the lease is lost, or may be.
    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire) || self.remaining().is_zero()
    }

    /// How long the lease is certainly held. A tenth of its length is kept as a margin.
    pub(super) fn remaining(&self) -> Duration {
        let safe = self.length.mul_f64(0.9);
        safe.saturating_sub(clock::since(*lock(&self.confirmed)))
    }

    /// Whether the job's owner has requested its cancellation.
    pub(super) fn is_canceled(&self) -> bool {
        self.cancel.load(Ordering::Acquire)
    }

    /// Sets the job's progress; the next heartbeat writes it to the row.
    pub(super) fn set_progress(&self, progress: Progress) {
        *lock(&self.progress) = Some(progress);
    }

    /// Sets how many images can be looked at so far.
    pub(super) fn set_images(&self, n: u64) {
        if let Some(progress) = lock(&self.progress).as_mut() {
            progress.images = n;
        }
    }

    /// Marks the lease as lost, after a write under it was refused.
    pub(super) fn mark_lost(&self) {
        self.lost.store(true, Ordering::Release);
    }
}

/// Renews every lease of this process.
#[derive(Clone, Debug)]
pub struct LeaseKeeper {
    held: Arc<Mutex<BTreeMap<Lease, Arc<LeaseHandle>>>>,
    length: Duration,
}

impl LeaseKeeper {
    /// A keeper of leases of this length. It renews nothing until [`LeaseKeeper::run`].
    pub fn new(length: Duration) -> Self {
        Self { held: Arc::default(), length }
    }

    /// Starts a thread with its own connection that sends a heartbeat every `interval` until `stop`.
    pub(super) fn start(
        &self,
        url: &str,
        interval: Duration,
        stop: CancellationToken,
    ) -> std::io::Result<()> {
        let (keeper, url) = (self.clone(), url.to_owned());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let run =
            move || runtime.block_on(keeper.run(async || Store::connect(&url, 1).await, interval, stop));
        std::thread::Builder::new().name("lease-keeper".into()).spawn(run)?;
        Ok(())
    }

    /// Keeps `lease` until the guard is dropped. `requested` is when the claim was sent.
    pub(super) fn hold(&self, lease: Lease, requested: Instant) -> LeaseGuard {
        let handle = Arc::new(LeaseHandle::new(lease, self.length, requested));
        lock(&self.held).insert(lease, handle.clone());
        LeaseGuard { keeper: self.clone(), handle }
    }

    /// Sends a heartbeat every `interval` until `stop`, on the connection that `connect` makes.
    pub async fn run(
        self,
        connect: impl AsyncFn() -> crate::store::Result<Store>,
        interval: Duration,
        stop: CancellationToken,
    ) {
        let mut store = None;
        let mut failing = false;
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = clock::sleep(interval) => {}
            }
            let held: Vec<Arc<LeaseHandle>> = lock(&self.held).values().cloned().collect();
            if held.is_empty() {
                continue;
            }
            match self.heartbeat(&mut store, &connect, &held).await {
                Ok(()) => failing = false,
                Err(error) if !failing => {
                    failing = true; // logged once, until it succeeds again
                    warn!(%error, "lease renewal failed");
                }
                Err(_) => {}
            }
        }
    }

    async fn heartbeat(
        &self,
        store: &mut Option<Store>,
        connect: &impl AsyncFn() -> crate::store::Result<Store>,
        held: &[Arc<LeaseHandle>],
    ) -> crate::store::Result<()> {
        if store.is_none() {
            *store = Some(connect().await?);
        }
        let Some(store) = store else { return Ok(()) };
        let mut failed = None;
        for handle in held {
            let requested = clock::now();
            let progress = lock(&handle.progress).clone();
            match store.renew(handle.lease, self.length, progress.as_ref()).await {
                Ok(Renewal::Held { cancel_requested }) => {
                    *lock(&handle.confirmed) = requested;
                    handle.cancel.store(cancel_requested, Ordering::Release);
                }
                Ok(Renewal::Lost) => handle.mark_lost(),
                Err(error) => failed = Some(error), // one locked row must not cost the others their leases
            }
        }
        failed.map_or(Ok(()), Err)
    }
}

/// Keeps a lease renewed until it is dropped.
#[derive(Debug)]
pub(super) struct LeaseGuard {
    keeper: LeaseKeeper,
    pub(super) handle: Arc<LeaseHandle>,
}

impl Drop for LeaseGuard {
    fn drop(&mut self) {
        lock(&self.keeper.held).remove(&self.handle.lease);
        self.handle.mark_lost(); // the device may still work on the job if its task ended early
    }
}

/// Every value behind these locks is valid even after a panic elsewhere.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
