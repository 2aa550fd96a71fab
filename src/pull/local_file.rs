//! Files that are on this machine.

use std::path::PathBuf;

/// A file that is there, and what it is.
#[derive(Clone, Debug)]
pub(super) struct LocalFile {
    pub(super) path: PathBuf,
    /// In lower-case hexadecimal.
    pub(super) sha256: String,
    /// The commit of its repository, where that was told.
    pub(super) commit: Option<String>,
}
