//! Our operations with backward.

#[cfg(feature = "cuda")]
pub(super) mod cuda;
