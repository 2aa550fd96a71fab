//! The error of the core, and the one place where the tensor library's errors are classified.

use std::error::Error as StdError;
use std::io;
use std::path::{Path, PathBuf};

/// Why something in `ml` did not work. Each is one line for a person.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file that cannot be used, read or written.
    #[error("{}: {}", one_line(&.path.to_string_lossy()), one_line(.what))]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong with it, without its name.
        what: String,
        /// What it came from.
        source: Option<Box<dyn StdError + Send + Sync>>,
    },
    /// A setting with a value that cannot be honoured.
    #[error("{}: {}", one_line(.name), one_line(.what))]
    Setting {
        /// Which.
        name: String,
        /// What came and what was wanted.
        what: String,
    },
    /// Other input that cannot work: what came, what was wanted, and where.
    #[error("{}", one_line(.0))]
    Input(String),
    /// Computed values outside a training that are infinite or not a number.
    #[error("{}", one_line(.0))]
    NotFinite(String),
    /// A training whose loss or gradient is no longer finite.
    #[error("the loss was no longer a finite number at step {step}; try a lower learning rate")]
    Diverged {
        /// The step, counted from 1.
        step: u64,
    },
    /// The device has no memory left. It is as good as before.
    #[error("{}", first_line(.0))]
    OutOfMemory(#[source] candle_core::Error),
    /// The device's driver or one of its libraries failed: it may answer everything with the same error until the
    /// process ends.
    #[error("{}", first_line(.0))]
    DeviceLost(#[source] candle_core::Error),
    /// The tensor library failed.
    #[error("{}", first_line(.0))]
    Tensor(#[source] candle_core::Error),
}

/// A result whose error is one line for a person.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Whether the machine failed, and not what it was given.
    pub fn is_machine_failure(&self) -> bool {
        match self {
            Self::Tensor(_) | Self::OutOfMemory(_) | Self::DeviceLost(_) => true,
            Self::File { source: Some(source), .. } => {
                source.downcast_ref::<io::Error>().is_some_and(|error| {
                    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
                })
            }
            _ => false,
        }
    }

    /// An [`Error::Input`].
    pub fn input(message: impl Into<String>) -> Self {
        Self::Input(message.into())
    }

    /// An [`Error::Setting`].
    pub fn setting(name: impl Into<String>, what: impl Into<String>) -> Self {
        Self::Setting { name: name.into(), what: what.into() }
    }

    /// An [`Error::File`].
    pub(crate) fn file(path: impl AsRef<Path>, what: impl Into<String>) -> Self {
        Self::File { path: path.as_ref().to_owned(), what: what.into(), source: None }
    }

    /// An [`Error::File`] that comes from another error.
    pub(crate) fn file_from(
        path: impl AsRef<Path>,
        what: impl Into<String>,
        source: impl StdError + Send + Sync + 'static,
    ) -> Self {
        Self::File { path: path.as_ref().to_owned(), what: what.into(), source: Some(Box::new(source)) }
    }

    /// An [`Error::File`] for an operation that the system refused: `what` is `cannot be read` or the like.
    pub(crate) fn io(path: impl AsRef<Path>, what: &str, error: io::Error) -> Self {
        Self::file_from(path, format!("{what}: {}", io_words(&error)), error)
    }

    /// Whether what was given is at fault: files, settings, other input, values. The rest is the machine's doing, or a
    /// training's.
    pub fn is_input(&self) -> bool {
        matches!(self, Self::File { .. } | Self::Setting { .. } | Self::Input(_) | Self::NotFinite(_))
    }

    /// The same error, of a file that is called otherwise: where it lies at or below `from`, that part of its path is
    /// `to`.
    #[must_use]
    pub fn renamed(self, from: &Path, to: &Path) -> Self {
        match self {
            Self::File { path, what, source } => {
                let path = match path.strip_prefix(from) {
                    Ok(rest) if rest.as_os_str().is_empty() => to.to_owned(),
                    Ok(rest) => to.join(rest),
                    Err(_) => path,
                };
                Self::File { path, what, source }
            }
            other => other,
        }
    }
}

/// Signs of a device without memory in the text of a candle error.
const OUT_OF_MEMORY: [&str; 3] = ["out of memory", "OUT_OF_MEMORY", "ALLOC_FAILED"];

/// Signs of the driver and its libraries.
const OF_THE_DRIVER: [&str; 7] = [
    "CUDA_ERROR",
    "DriverError",
    "CublasError",
    "CUBLAS_STATUS",
    "CudnnError",
    "CUDNN_STATUS",
    "CurandError",
];

impl From<candle_core::Error> for Error {
    /// Errors of the driver come through candle as text only, so that text is searched: here and nowhere else.
    fn from(error: candle_core::Error) -> Self {
        let words = first_line(&error);
        let says = |signs: &[&str]| signs.iter().any(|sign| words.contains(sign));
        if says(&OUT_OF_MEMORY) {
            Self::OutOfMemory(error)
        } else if says(&OF_THE_DRIVER) {
            Self::DeviceLost(error)
        } else {
            Self::Tensor(error)
        }
    }
}

/// candle appends a backtrace to its text; a person reads the first line.
fn first_line(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or("unknown").to_owned()
}

/// The text with its control characters escaped: names of tensors, keys and files are anybody's, and one with a line break
/// or a terminal's escape sequence must not look like something else.
fn one_line(text: &str) -> String {
    text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
}

/// The system's words for an error, in lower case and without its number.
pub fn io_words(e: &dyn StdError) -> String {
    let words = e.to_string();
    words.split(" (os error").next().unwrap_or(&words).to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_of_a_name_are_escaped() {
        let error = Error::file("a\nb", "tensor `x\n\u{1b}[2J\u{e9}` is missing");
        assert_eq!(error.to_string(), "a\\nb: tensor `x\\n\\u{1b}[2J\u{e9}` is missing");
    }

    #[test]
    fn a_full_disk_is_the_machine_s_failure_and_a_missing_file_is_not() {
        let failed =
            |kind: io::ErrorKind| Error::io("out", "cannot be written", kind.into()).is_machine_failure();
        assert!(failed(io::ErrorKind::StorageFull) && failed(io::ErrorKind::QuotaExceeded));
        assert!(!failed(io::ErrorKind::NotFound) && !Error::file("out", "is missing").is_machine_failure());
    }

    #[test]
    fn a_renamed_file_keeps_what_lies_below_the_renamed_part() {
        let at = |path: &str| Error::file(path, "is missing").renamed("/tmp/a.part".as_ref(), "out".as_ref());
        assert_eq!(at("/tmp/a.part").to_string(), "out: is missing");
        assert_eq!(at("/tmp/a.part/vae/config.json").to_string(), "out/vae/config.json: is missing");
        assert_eq!(at("/tmp/b/config.json").to_string(), "/tmp/b/config.json: is missing");
    }
}
