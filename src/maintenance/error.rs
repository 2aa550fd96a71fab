//! Errors of the maintenance services.

use crate::{blobs, store};

/// What made a maintenance service fail.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// Why something was not removed.
#[derive(Debug, thiserror::Error)]
pub(super) enum RemovalError {
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error(transparent)]
    Blobs(#[from] blobs::Error),
}

impl RemovalError {
    /// Whether it may succeed later with nothing changed.
    pub(super) fn is_transient(&self) -> bool {
        match self {
            Self::Store(_) => true,
            Self::Blobs(error) => error.is_transient(),
        }
    }
}
