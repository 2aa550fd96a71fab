//! Why a pull ends.

use std::io;
use std::path::Path;

use crate::ml;

/// Why a pull ends, in one line.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// What was asked for cannot be: the sources, the token, what lies in the directories.
    #[error("{0}")]
    Input(String),
    /// The network, a hub or this machine failed.
    #[error("{0}")]
    Failed(String),
}

impl Error {
    /// A file or a directory that this machine cannot write or read.
    pub(super) fn io(path: &Path, what: &str, error: &io::Error) -> Self {
        Self::Failed(format!("{}: {what}: {}", path.display(), ml::io_words(error)))
    }
}

impl From<ml::Error> for Error {
    fn from(error: ml::Error) -> Self {
        let line = error.to_string();
        if error.is_machine_failure() { Self::Failed(line) } else { Self::Input(line) }
    }
}
