//! What can be wrong with the store, in words that may be logged and shown: never a path, a key, or a server's XML.

use std::error::Error as StdError;
use std::io;

use object_store::client::{HttpError, HttpErrorKind};

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
    /// The local file that is sent or fetched cannot be read or written: this machine's fault, not the store's. The word
    /// says why.
    #[error("a local file cannot be read or written: {0}")]
    Local(String),
}

impl Error {
    /// The store did not answer in time.
    pub(super) fn timeout() -> Self {
        Self::Away("timeout".into())
    }

    /// A bucket that is not there is no missing object.
    pub(super) fn while_writing(self) -> Self {
        if self == Self::Missing { Self::Away("no such bucket or directory".into()) } else { self }
    }
}

impl From<object_store::Error> for Error {
    fn from(error: object_store::Error) -> Self {
        match &error {
            object_store::Error::NotFound { .. } => return Self::Missing,
            object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. } => {
                return Self::Away("access denied".into());
            }
            _ => {}
        }
        let mut cause: Option<&(dyn StdError + 'static)> = Some(&error);
        while let Some(link) = cause {
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
        answer(&error.to_string())
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
    Error::Away(if said.is_empty() { "an answer that makes no sense".into() } else { said.join(" ") })
}
