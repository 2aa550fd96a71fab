//! What all jobs of a worker process share.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use tokio_util::sync::CancellationToken;

use super::cache::WeightsCache;
use super::lease::LeaseKeeper;
use super::scratch::Scratch;
use super::settings::Settings;
use crate::blobs::Blobs;
use crate::store::Store;

/// Connections, caches and settings of a worker process. Clones share them.
///
/// The steps of a job are its methods: `train.rs`, `sample.rs`, `artifacts.rs`, `finish.rs` and `job.rs`.
#[derive(Clone, Debug)]
pub(super) struct Worker {
    pub(super) store: Store,
    pub(super) blobs: Blobs,
    pub(super) settings: Arc<Settings>,
    pub(super) lease_keeper: LeaseKeeper,
    pub(super) weights: WeightsCache,
    pub(super) scratch: Arc<Scratch>,
    /// Faults of the machine on any device of this process. A device that has not been probed since the last one is
    /// probed before it claims.
    pub(super) n_machine_faults: Arc<AtomicU64>,
    /// Cancelled at shutdown: nothing more is claimed, and jobs go back to the queue, trainings with a checkpoint.
    pub(super) drain: CancellationToken,
}
