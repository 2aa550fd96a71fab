//! What can be wrong with the store, in words that may be logged and shown: never a path, a key, or a server's XML.

use std::error::Error as StdError;
use std::fmt;
use std::io;

use object_store::client::{HttpError, HttpErrorKind};

/// What is said of an answer that has neither status nor code.
const NONSENSE: &str = "an answer that makes no sense";

/// Why an object could not be written or read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It is not there. Trying again does not help.
    #[error("the object is not in the store")]
    Missing,
    /// It is not what was written: another size or hash, twice in a row.
    #[error("the object in the store is damaged")]
    Damaged,
    /// There is no room for it.
    #[error("the store is full")]
    Full,
    /// The store does not answer, or not as it should; for how long cannot be told. What was being written may be there
    /// or not. The word says what happened, such as `503 SlowDown`, `timeout` or `connection refused`.
    #[error("the store cannot be reached: {0}")]
    Away(String),
    /// The store answered that it will not do this: a setting is wrong, or a right is missing. The same again is refused
    /// again, until somebody changes something.
    #[error("the store refuses: {0}")]
    Refused(Refusal),
    /// The local file that is sent or fetched cannot be read or written: this machine's fault, not the store's. The word
    /// says why.
    #[error("a local file cannot be read or written: {0}")]
    Local(String),
}

/// Why a store refuses, in its own words as far as they may be shown: the status and the code of its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub(super) status: u16,
    /// S3's word for it, such as `AccessDenied`; empty where the answer has none.
    pub(super) code: String,
    /// The sentence beside the code; for operators only.
    pub(super) message: String,
    /// The region that the answer names, where it names one.
    pub(super) region: Option<String>,
    /// How far the store's clock is ahead of ours, in seconds, where they differ by minutes.
    pub(super) clock_ahead: Option<i64>,
    /// Whether it came from the service that hands out credentials, and not from the store.
    pub(super) of_credentials: bool,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.of_credentials {
            f.write_str("the service that gives credentials answers ")?;
        }
        write!(f, "{}", self.status)?;
        if self.code.is_empty() { Ok(()) } else { write!(f, " {}", self.code) }
    }
}

impl Refusal {
    /// All that the store said, and which setting it is about; for the operator, not for clients.
    pub fn in_full(&self) -> String {
        let Self { message, region, clock_ahead, .. } = self;
        let mut said = vec![self.to_string()];
        if !message.is_empty() {
            said[0] = format!("{self} ({})", message.trim_end_matches('.'));
        }
        if let Some(region) = region {
            said.push(format!("the bucket is in the region {region}, which HYPNOS_S3_REGION must name"));
        }
        if let Some(seconds) = clock_ahead {
            let how = if *seconds < 0 { "ahead of" } else { "behind" };
            said.push(format!("this machine's clock is {} s {how} the store's", seconds.abs()));
        }
        said.join("; ")
    }
}

impl StdError for Refusal {}

impl Error {
    /// The store did not answer in time.
    pub(super) fn timeout() -> Self {
        Self::Away("timeout".into())
    }

    /// Whether it may be another answer in a while, with nothing changed.
    pub fn is_of_the_moment(&self) -> bool {
        match self {
            Self::Away(why) => why != NONSENSE,
            Self::Full => true,
            Self::Missing | Self::Damaged | Self::Refused(_) | Self::Local(_) => false,
        }
    }

    /// A bucket that is not there is no missing object.
    pub(super) fn while_writing(self) -> Self {
        if self == Self::Missing { Self::Away("no such bucket or directory".into()) } else { self }
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
                return Self::Away(word.into());
            }
            cause = link.source();
        }
        match error {
            object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. } => {
                Self::Away("access denied".into())
            }
            error => answer(&error.to_string()),
        }
    }
}

impl From<io::ErrorKind> for Error {
    fn from(kind: io::ErrorKind) -> Self {
        match kind {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full,
            kind => Self::Away(kind.to_string()),
        }
    }
}

impl From<io::Error> for Error {
    /// Of a local file that is sent or fetched: one that is not there is no missing object.
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

/// Status and code of a server's answer, which the library has as text only.
fn answer(text: &str) -> Error {
    let after = |mark: &str| text.split_once(mark).map_or("", |(_, after)| after);
    let word = |text: &str| text.chars().take_while(char::is_ascii_alphanumeric).take(40).collect::<String>();
    let (status, code) = (word(after("status code: ")), word(after("<Code>")));
    if status == "507" {
        return Error::Full;
    }
    let said: Vec<_> = [status, code].into_iter().filter(|word| !word.is_empty()).collect();
    Error::Away(if said.is_empty() { NONSENSE.into() } else { said.join(" ") })
}
