//! Decodes uploaded photos with limits of time and number; `hypnos-photo` decodes.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
pub use hypnos_photo::{ACCEPTED, Inspection, Limits, Photo, Refusal, Warning, decode, duplicates};
use tokio::sync::Semaphore;

use crate::memory::giving_back;

/// Decodes a limited number of files at a time, on threads for blocking work, each within a time limit.
#[derive(Clone, Debug)]
pub struct Decoder {
    limits: Limits,
    n_parallel: usize,
    slots: Arc<Semaphore>,
    time_limit: Duration,
}

impl Decoder {
    /// At most `n_parallel` files at a time; together they take `n_parallel` times [`Limits::bytes_max`], twice over.
    pub fn new(limits: Limits, n_parallel: usize, time_limit: Duration) -> Self {
        let n_parallel = n_parallel.max(1);
        Self { limits, n_parallel, slots: Arc::new(Semaphore::new(n_parallel)), time_limit }
    }

    /// How many files are decoded at a time.
    pub fn n_parallel(&self) -> usize {
        self.n_parallel
    }

    /// [`decode`], refused as `image-too-complex` when it takes longer than the time limit, and as `decoder-busy` (503)
    /// when no slot came free within it.
    ///
    /// A thread cannot be stopped from outside: one that is too slow runs to its end and keeps its slot until then, so
    /// that slow files never take more threads than there are slots.
    pub async fn decode(&self, bytes: Bytes) -> Result<Photo, Refusal> {
        let slot = tokio::time::timeout(self.time_limit, Arc::clone(&self.slots).acquire_owned()).await;
        let Ok(Ok(slot)) = slot else {
            let message = "too many photos are being decoded; send it again in a few seconds";
            return Err(Refusal { status: 503, ..Refusal::new("decoder-busy", message) });
        };
        let limits = self.limits;
        let work = tokio::task::spawn_blocking(move || {
            let _slot = slot;
            // A picture takes a hundred megabytes for a moment, which a worker's allocator would otherwise keep.
            giving_back(|| {
                let photo = decode(&bytes, &limits);
                drop(bytes);
                photo
            })
        });
        match tokio::time::timeout(self.time_limit, work).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_panicked)) => Err(Refusal::damaged()),
            Err(_elapsed) => {
                metrics::counter!("hypnos_photo_timeouts_total").increment(1);
                let message = format!("the picture takes longer than {:?} to decode", self.time_limit);
                Err(Refusal::new("image-too-complex", message))
            }
        }
    }
}
