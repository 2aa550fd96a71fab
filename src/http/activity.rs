//! When something last happened: shared by what does it and what watches.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use tokio::time::Instant;

/// When there was last a sign of life, in milliseconds on a clock of our own.
#[derive(Clone, Debug)]
pub(super) struct Life(Arc<AtomicU64>);

impl Default for Life {
    fn default() -> Self {
        Self::begin()
    }
}

impl Life {
    fn now() -> u64 {
        static BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);
        BEGAN.elapsed().as_millis() as u64
    }

    pub(super) fn begin() -> Self {
        Self(Arc::new(AtomicU64::new(Self::now())))
    }

    pub(super) fn sign(&self) {
        self.0.store(Self::now(), Ordering::Relaxed);
    }

    /// How long there has been none.
    pub(super) fn silence(&self) -> Duration {
        Duration::from_millis(Self::now().saturating_sub(self.0.load(Ordering::Relaxed)))
    }
}
