//! Retries of store and object store operations for as long as the job's lease is held.

use std::time::Duration;

use super::lease::LeaseHandle;
use crate::clock;
use crate::{blobs, store};

/// First wait between two attempts at an operation; doubled up to [`WAIT_MAX`].
pub(super) const WAIT: Duration = Duration::from_millis(500);
const WAIT_MAX: Duration = Duration::from_secs(15);

/// Why an operation was given up.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refused<E> {
    /// The lease was lost.
    #[error("the lease was lost")]
    LeaseLost,
    /// The error is permanent.
    #[error(transparent)]
    Error(#[from] E),
}

/// Errors of which some are worth a retry.
pub(super) trait Transient {
    /// Whether a retry may succeed.
    fn is_transient(&self) -> bool;
    /// Whether the error means that the lease is lost.
    fn is_lease_lost(&self) -> bool;
}

impl Transient for blobs::Error {
    fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable(_) | Self::Full | Self::Refused(_))
    }

    fn is_lease_lost(&self) -> bool {
        false
    }
}

impl Transient for store::Error {
    fn is_transient(&self) -> bool {
        // Another schema may be that of a database which is just being restored.
        matches!(self, Self::Unavailable(_) | Self::Unknown(_) | Self::Schema(_))
    }

    fn is_lease_lost(&self) -> bool {
        matches!(self, Self::LeaseLost)
    }
}

/// Runs `operation` until it succeeds or fails permanently, but no longer than the lease is held.
pub(super) async fn retry_while_leased<T, E: Transient, F: Future<Output = Result<T, E>>>(
    lease: &LeaseHandle,
    operation: impl Fn() -> F,
) -> Result<T, Refused<E>> {
    let mut wait = WAIT;
    loop {
        if lease.is_lost() {
            return Err(Refused::LeaseLost);
        }
        match operation().await {
            Ok(done) => return Ok(done),
            Err(error) if error.is_lease_lost() => {
                lease.mark_lost();
                return Err(Refused::LeaseLost);
            }
            Err(error) if !error.is_transient() => return Err(Refused::Error(error)),
            Err(_) => clock::sleep(wait.min(lease.remaining())).await,
        }
        wait = (wait * 2).min(WAIT_MAX);
    }
}
