//! How an attempt ended.

use serde_json::Value;

use super::retry::Refused;
use crate::blobs;
use crate::job::{Fault, FaultCode, Object};
use crate::store;

/// How an attempt ended.
pub(super) enum Outcome {
    /// Succeeded; its result is in the object store.
    Done {
        /// The result that the row keeps.
        result: Value,
        /// The artifacts that the row is to name.
        objects: Vec<Object>,
    },
    /// Interrupted by shutdown; goes back to the queue and resumes from its last checkpoint.
    Paused,
    /// Canceled by its owner.
    Canceled,
    /// The lease was lost: nothing may be written.
    Lost,
    /// Failed.
    Failed(Fault),
}

impl Outcome {
    /// The reason, for the log.
    pub(super) fn reason(&self) -> &str {
        match self {
            Self::Failed(fault) => &fault.message,
            Self::Lost => "the lease was lost",
            Self::Done { .. } | Self::Paused | Self::Canceled => "the job has ended",
        }
    }
}

impl From<Fault> for Outcome {
    fn from(fault: Fault) -> Self {
        Self::Failed(fault)
    }
}

impl From<Refused<blobs::Error>> for Outcome {
    fn from(refused: Refused<blobs::Error>) -> Self {
        match refused {
            Refused::LeaseLost => Self::Lost,
            Refused::Error(error) => {
                let code = match error {
                    blobs::Error::Missing | blobs::Error::Damaged => FaultCode::ArtifactMissing,
                    _ => FaultCode::Machine,
                };
                Self::Failed(Fault::new(code, error.to_string()))
            }
        }
    }
}

impl From<Refused<store::Error>> for Outcome {
    fn from(refused: Refused<store::Error>) -> Self {
        match refused {
            Refused::LeaseLost => Self::Lost,
            Refused::Error(error) => Self::Failed(Fault::new(FaultCode::Machine, error.to_string())),
        }
    }
}
