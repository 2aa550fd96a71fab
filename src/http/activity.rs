//! Time since the last activity, shared by what is active and what watches it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use tokio::time::Instant;

/// When something was last active. Clones are one.
#[derive(Clone, Debug)]
pub(super) struct Activity(Arc<AtomicU64>);

impl Default for Activity {
    fn default() -> Self {
        Self::new()
    }
}

impl Activity {
    /// Active now.
    pub(super) fn new() -> Self {
        Self(Arc::new(AtomicU64::new(Self::now_ms())))
    }

    /// Records that there was activity now.
    pub(super) fn touch(&self) {
        self.0.store(Self::now_ms(), Ordering::Relaxed);
    }

    /// Time since the last activity.
    pub(super) fn idle(&self) -> Duration {
        Duration::from_millis(Self::now_ms().saturating_sub(self.0.load(Ordering::Relaxed)))
    }

    /// Milliseconds since the first call in this process.
    fn now_ms() -> u64 {
        static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);
        EPOCH.elapsed().as_millis() as u64
    }
}
