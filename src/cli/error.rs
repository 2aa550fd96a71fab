//! The error that ends a command, and its exit code.

use std::io;
use std::path::Path;

use crate::config::ConfigError;
use crate::job::{Fault, FaultCode};
use crate::{ml, pull};

/// Why a command failed, in one line.
#[derive(Debug)]
pub(super) enum CliError {
    /// The input is invalid: exit code 2.
    Input(String),
    /// The machine failed: exit code 1.
    Failed(String),
    /// A second termination signal: exit code 1.
    Interrupted,
}

/// What the system refuses to do with a path, in one line: `what` is `cannot be read` or the like.
pub(super) fn unusable(path: &Path, what: &str, error: &io::Error) -> String {
    format!("{}: {what}: {}", path.display(), ml::io_words(error))
}

impl From<ml::Error> for CliError {
    fn from(error: ml::Error) -> Self {
        let line = error.to_string();
        if error.is_machine_failure() { Self::Failed(line) } else { Self::Input(line) }
    }
}

impl From<pull::Error> for CliError {
    fn from(error: pull::Error) -> Self {
        match error {
            pull::Error::Input(line) => Self::Input(line),
            pull::Error::Failed(line) => Self::Failed(line),
        }
    }
}

impl From<ConfigError> for CliError {
    fn from(wrong: ConfigError) -> Self {
        Self::Input(wrong.to_string())
    }
}

impl From<Fault> for CliError {
    fn from(fault: Fault) -> Self {
        if fault.code == FaultCode::Input { Self::Input(fault.message) } else { Self::Failed(fault.message) }
    }
}
