//! Errors of the object store, as texts that may be logged and shown: never a path, a key, or a server's XML.

use std::error::Error as StdError;
use std::fmt;
use std::io;

use object_store::client::{HttpError, HttpErrorKind};

/// Text for an answer with neither status nor code.
const UNINTELLIGIBLE: &str = "unintelligible answer";

/// Why an object could not be written or read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The object does not exist. A retry does not help.
    #[error("the object is not in the store")]
    Missing,
    /// The object is not what was written: another size or hash, twice in a row.
    #[error("the object in the store is damaged")]
    Damaged,
    /// The store has no space left.
    #[error("the store is full")]
    Full,
    /// The store does not answer, or not properly; for how long is unknown. An object that was being written may or may
    /// not exist. The text says what happened, such as `503 SlowDown`, `timeout` or `connection refused`.
    #[error("the store cannot be reached: {0}")]
    Unavailable(String),
    /// The store rejected the request: a setting is wrong, or a permission is missing. A retry is rejected again until
    /// an operator changes something.
    #[error("the store rejects the request: {0}")]
    Refused(Refusal),
    /// The local file that is sent or fetched cannot be read or written: a fault of this machine, not of the store. The
    /// text says why.
    #[error("a local file cannot be read or written: {0}")]
    Local(String),
}

/// Why the store rejected a request: the status and the code of its answer, as far as they may be shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub(super) status: u16,
    /// S3's error code, such as `AccessDenied`; empty if the answer has none.
    pub(super) code: String,
    /// S3's error message; for operators only.
    pub(super) message: String,
    /// The region that the answer names, if any.
    pub(super) region: Option<String>,
    /// How far the store's clock is ahead of this machine's, in seconds, if they differ by minutes.
    pub(super) clock_ahead: Option<i64>,
    /// Whether the answer came from the credentials service instead of the store.
    pub(super) of_credentials: bool,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.of_credentials {
            f.write_str("the credentials service answers ")?;
        }
        write!(f, "{}", self.status)?;
        if self.code.is_empty() { Ok(()) } else { write!(f, " {}", self.code) }
    }
}

impl Refusal {
    /// Everything that the store answered, and which setting it concerns; for operators, not for clients.
    pub fn details(&self) -> String {
        let Self { message, region, clock_ahead, .. } = self;
        let mut parts = vec![self.to_string()];
        if !message.is_empty() {
            parts[0] = format!("{self} ({})", message.trim_end_matches('.'));
        }
        if let Some(region) = region {
            parts.push(format!("the bucket is in the region {region}, which HYPNOS_S3_REGION must name"));
        }
        if let Some(seconds) = clock_ahead {
            let how = if *seconds < 0 { "ahead of" } else { "behind" };
            parts.push(format!("this machine's clock is {} s {how} the store's", seconds.abs()));
        }
        parts.join("; ")
    }
}

impl StdError for Refusal {}

impl Error {
    /// The error for an answer that did not come in time.
    pub(super) fn timeout() -> Self {
        Self::Unavailable("timeout".into())
    }

    /// Whether a later retry may succeed with nothing changed.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unavailable(why) => why != UNINTELLIGIBLE,
            Self::Full => true,
            Self::Missing | Self::Damaged | Self::Refused(_) | Self::Local(_) => false,
        }
    }

    /// While writing, `Missing` means a missing bucket or directory.
    pub(super) fn while_writing(self) -> Self {
        if self == Self::Missing { Self::Unavailable("no such bucket or directory".into()) } else { self }
    }
}

impl From<object_store::Error> for Error {
    fn from(error: object_store::Error) -> Self {
        if let object_store::Error::NotFound { .. } = &error {
            return Self::Missing;
        }
        let mut cause: Option<&(dyn StdError + 'static)> = Some(&error);
        while let Some(link) = cause {
            if let Some(refusal) = link.downcast_ref::<Refusal>() {
                return Self::Refused(refusal.clone());
            }
            if let Some(error) =
                link.downcast_ref::<io::Error>().filter(|error| error.kind() != io::ErrorKind::Other)
            {
                return error.kind().into();
            }
            if let Some(error) = link.downcast_ref::<HttpError>()
                && let Some(word) = transport(error.kind())
            {
                return Self::Unavailable(word.into());
            }
            cause = link.source();
        }
        match error {
            object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. } => {
                Self::Unavailable("access denied".into())
            }
            error => from_answer(&error.to_string()),
        }
    }
}

impl From<io::ErrorKind> for Error {
    fn from(kind: io::ErrorKind) -> Self {
        match kind {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full,
            kind => Self::Unavailable(kind.to_string()),
        }
    }
}

impl From<io::Error> for Error {
    /// The error of a local file: a missing file is no missing object.
    fn from(error: io::Error) -> Self {
        Self::Local(error.kind().to_string())
    }
}

fn transport(kind: HttpErrorKind) -> Option<&'static str> {
    match kind {
        HttpErrorKind::Connect => Some("no connection"),
        HttpErrorKind::Timeout => Some("timeout"),
        HttpErrorKind::Interrupted | HttpErrorKind::Decode => Some("the answer was cut off"),
        HttpErrorKind::Request => Some("the request could not be sent"),
        _ => None,
    }
}

/// The error for a server's answer, of which the library gives only a text.
fn from_answer(text: &str) -> Error {
    let after = |mark: &str| text.split_once(mark).map_or("", |(_, after)| after);
    let word = |text: &str| text.chars().take_while(char::is_ascii_alphanumeric).take(40).collect::<String>();
    let (status, code) = (word(after("status code: ")), word(after("<Code>")));
    if status == "507" {
        return Error::Full;
    }
    let words: Vec<_> = [status, code].into_iter().filter(|word| !word.is_empty()).collect();
    Error::Unavailable(if words.is_empty() { UNINTELLIGIBLE.into() } else { words.join(" ") })
}
