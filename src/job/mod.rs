//! Shared types: what clients request, what rows hold, what workers report. No I/O.
//!
//! A *job* is a row of the queue. It is either a *training*, on photos, or a *sample*: images drawn with a training's
//! result. Both are queued, claimed under a lease, run, and finished once.

mod checks;
mod model;
mod options;
mod spec;
mod string_enum;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

pub(crate) use checks::pointer;
pub use checks::{
    CLASS_NAME_CHARS_MAX, CLASS_NAME_PATTERN, Invalid, PROMPT_PATTERN, SEED_MAX, class_name, template_pattern,
};
pub use model::{HeldModel, ModelCard, ModelDrawing, ModelPart, ModelRef, WaitingFor, Warning, WarningCode};
pub use options::{
    AdamwMoments, Discriminator, Evaluation, Format, LossWeights, Method, Perceptual, Reconstruction,
    STEPS_MAX, Scheduler, Templates, TrainOptions, Views, merge_json,
};
pub use spec::{N_PHOTOS_MAX, N_PHOTOS_MIN, PRODUCT, SampleSpec, TrainSpec};
pub(crate) use string_enum::string_enum;

/// Name of the artifact with a training's weights.
pub const WEIGHTS: &str = "weights.safetensors";
/// Name of the artifact with a training's report.
pub const REPORT: &str = "report.json";
/// Name of the artifact with the report as a page.
pub const PAGE: &str = "report.html";

/// Defines an identifier type: UUID version 7, so that ids sort by time.
macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
        #[serde(transparent)]
        #[schema(value_type = Uuid)]
        pub struct $name(pub Uuid);

        impl $name {
            /// A new id.
            #[allow(clippy::new_without_default)]
            pub fn new() -> Self {
                Self(Uuid::now_v7())
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.hyphenated().fmt(f)
            }
        }

        impl std::str::FromStr for $name {
            type Err = String;

            /// Parses only the hyphenated lower-case form, as ids are written.
            fn from_str(text: &str) -> Result<Self, String> {
                let parsed = Uuid::try_parse(text).ok().map(Self);
                let is_canonical = |id: &Self| id.0.hyphenated().encode_lower(&mut Uuid::encode_buffer()) == text;
                parsed.filter(is_canonical).ok_or_else(|| "not an id".into())
            }
        }
    };
}

id!(
    /// Whose things these are. Every query takes one.
    TenantId
);
id!(
    /// One row of the queue, of either kind.
    JobId
);

impl TenantId {
    /// The tenant of a server without keys.
    pub const LOCAL: Self = Self(Uuid::nil());
}

string_enum!(
    /// What a job does.
    Kind {
        /// Fine-tunes the bundle on photos.
        Train = "train",
        /// Draws pictures with a training's result.
        Sample = "sample",
    }
);

string_enum!(
    /// The state of a job. The last three are final.
    State {
        /// Waits for a worker.
        Queued = "queued",
        /// A worker holds its lease.
        Running = "running",
        /// Done; its artifacts are there.
        Succeeded = "succeeded",
        /// Ended by a fault; `error` says which.
        Failed = "failed",
        /// Ended by its owner.
        Canceled = "canceled",
    }
);

impl State {
    /// Whether it never changes again.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Canceled)
    }
}

string_enum!(
    /// The phase of a running job.
    Phase {
        /// Fetches photos and weights, encodes what never changes.
        Preparing = "preparing",
        /// Finds the product in its photos and makes views of it.
        Refining = "refining",
        /// Draws the class images for the prior preservation.
        ClassImages = "class_images",
        /// Trains the discriminator to recognise the product.
        Discriminating = "discriminating",
        /// Takes steps.
        Training = "training",
        /// Draws pictures.
        Drawing = "drawing",
        /// Compares them with the photos and with their prompts.
        Evaluating = "evaluating",
        /// Writes the result to the store.
        Storing = "storing",
    }
);

/// How far a running job is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Progress {
    /// Its phase.
    pub phase: Phase,
    /// Steps of this phase done.
    pub step: u64,
    /// Steps of this phase; 0 where it is not known.
    pub total: u64,
    /// Estimated seconds until the whole job is done.
    pub eta_seconds: Option<f64>,
    /// Pictures drawn so far that can be fetched.
    pub images: u64,
    /// The last step's loss, while training.
    pub loss: Option<f64>,
}

impl Progress {
    /// The beginning of a phase.
    pub fn begin(phase: Phase, total: u64) -> Self {
        Self { phase, step: 0, total, eta_seconds: None, images: 0, loss: None }
    }
}

string_enum!(
    /// Why a job failed. Stable: clients may act on it.
    FaultCode {
        /// The photos, texts or options are unusable, which could not be seen when the job was accepted; or the training
        /// takes more memory than its worker may take on an idle machine.
        Input = "input",
        /// The loss was no longer a finite number.
        Diverged = "diverged",
        /// The machine failed: memory, disk, device; or too much of its memory was in use by others.
        Machine = "machine",
        /// An object that the job needs is not in the store, or not whole.
        ArtifactMissing = "artifact_missing",
        /// Its workers died under it as often as is allowed.
        WorkerLost = "worker_lost",
        /// It took longer than an attempt may.
        Deadline = "deadline",
        /// A fault of ours.
        Internal = "internal",
    }
);

/// Why a job failed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Fault {
    /// The kind of fault.
    pub code: FaultCode,
    /// One line for a person. Holds no path, no key and no prompt.
    pub message: String,
    /// Whether the same job, sent again, may succeed.
    pub retryable: bool,
    /// Whether the device cannot be used any more as it is. For whoever owns the device: no row keeps it.
    #[serde(skip)]
    #[schema(ignore)]
    pub device_lost: bool,
}

impl Fault {
    /// A fault; whether it is worth another attempt follows from its code.
    pub fn new(code: FaultCode, message: impl Into<String>) -> Self {
        let retryable = matches!(code, FaultCode::Machine | FaultCode::WorkerLost | FaultCode::Deadline);
        Self { code, message: message.into(), retryable, device_lost: false }
    }

    /// A fault of the machine after which its device cannot be used any more as it is.
    pub fn device_lost(message: impl Into<String>) -> Self {
        Self { device_lost: true, ..Self::new(FaultCode::Machine, message) }
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.code, self.message)
    }
}

/// An object in the object store, as rows name it. Its properties are kept here, not in the store's own attributes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Object {
    /// Its name within the job, such as `photo-0.png` or `weights.safetensors`.
    pub name: String,
    /// Its key in the store.
    pub key: String,
    /// Size in bytes.
    pub size: u64,
    /// SHA-256, lower-case hexadecimal.
    pub sha256: String,
    /// Media type.
    pub content_type: String,
    /// Metadata, such as an image's seed and prompt. A JSON object or null.
    #[serde(default)]
    pub meta: serde_json::Value,
}

/// A training's stored state, to resume from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Steps done.
    pub step: u64,
    /// The object that holds it.
    pub object: Object,
}

/// A job's specification, as its row keeps it: complete, without defaults that may change.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Spec {
    /// A training.
    Train(Box<TrainSpec>),
    /// A sample.
    Sample(SampleSpec),
}

impl Spec {
    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Train(_) => Kind::Train,
            Self::Sample(_) => Kind::Sample,
        }
    }

    /// What a worker must hold to run it, the SHA-256 or the name of a model; none if any will do. A sample needs its
    /// training's.
    pub fn needed_model(&self) -> Option<&str> {
        match self {
            Self::Train(spec) => spec.needed_model(),
            Self::Sample(_) => None,
        }
    }

    /// Order among the tenant's own jobs: larger first.
    pub fn priority(&self) -> i32 {
        match self {
            Self::Train(spec) => spec.options.priority,
            Self::Sample(_) => 0,
        }
    }
}

/// The right to write to a running job: incremented at every claim, named in every write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lease {
    /// The job.
    pub job: JobId,
    /// The number of the claim.
    pub run_lease: i64,
}

/// One row of the queue. Times are milliseconds since 1970, by the database's clock.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// Its id.
    pub id: JobId,
    /// Its tenant.
    pub tenant: TenantId,
    /// The training of a sample.
    pub parent: Option<JobId>,
    /// Its kind.
    pub kind: Kind,
    /// The specification as JSON, parsed only when needed: see [`Job::spec`].
    pub spec_json: String,
    /// The photos of a training, in order; empty for a sample.
    pub photos: Vec<Object>,
    /// Its state.
    pub state: State,
    /// Number of claims so far.
    pub run_lease: i64,
    /// Number of counted attempts so far.
    pub attempt: i64,
    /// Maximum number of attempts.
    pub max_attempts: i64,
    /// Whether its owner has requested its cancellation.
    pub cancel_requested: bool,
    /// The checkpoint that a further attempt resumes from.
    pub checkpoint: Option<Checkpoint>,
    /// Its progress; none before it first ran.
    pub progress: Option<Progress>,
    /// The result, such as the bundle's hash; set when it succeeded.
    pub result: Option<serde_json::Value>,
    /// Why it failed.
    pub error: Option<Fault>,
    /// Changes with every change of the row that a client can see.
    pub version: i64,
    /// When it was accepted.
    pub created_ms: i64,
    /// When it was first claimed.
    pub started_ms: Option<i64>,
    /// When it ended.
    pub finished_ms: Option<i64>,
    /// The job that it retries, which may be deleted by now.
    pub retry_of: Option<JobId>,
    /// W3C `traceparent` of the request that submitted it.
    pub trace: Option<String>,
    /// What a worker must hold to run it, the SHA-256 or the name of a model; none if any will do.
    pub model: Option<String>,
}

impl Job {
    /// The specification; an error if it is invalid.
    pub fn spec(&self) -> serde_json::Result<Spec> {
        serde_json::from_str(&self.spec_json)
    }

    /// The lease of the current claim.
    pub fn lease(&self) -> Lease {
        Lease { job: self.id, run_lease: self.run_lease }
    }
}
