//! What clients submit and list: new jobs, their idempotency keys, filters and queue lengths.

use crate::job::{Job, JobId, Kind, Object, Spec, State, TenantId};

/// A job to submit.
#[derive(Clone, Debug)]
pub struct NewJob {
    /// Its id; the objects that it names are already stored under it.
    pub id: JobId,
    /// Its tenant.
    pub tenant: TenantId,
    /// The training of a sample; none for a training.
    pub parent: Option<JobId>,
    /// Its specification.
    pub spec: Spec,
    /// A training's photos, in order.
    pub photos: Vec<Object>,
    /// Order among the tenant's own waiting jobs: larger first.
    pub priority: i32,
    /// Maximum number of attempts, at least 1.
    pub max_attempts: i64,
    /// Makes a request that is sent twice one job.
    pub idempotency: Option<Idempotency>,
    /// Maximum number of waiting jobs of this kind for the tenant, this one included.
    pub queue_max: u64,
    /// Its origin.
    pub origin: Origin,
}

/// The origin of a job, besides its request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// The job that it retries.
    pub retry_of: Option<JobId>,
    /// W3C `traceparent` of the request, so that the worker's spans belong to its trace.
    pub trace: Option<String>,
    /// [`Store::tenant_created_ms`](super::Store::tenant_created_ms), read before the first of the job's objects was
    /// written. If the tenant was erased since then, with all objects under its id, the job is not accepted.
    pub tenant_created_ms: Option<i64>,
}

/// An idempotency key, kept for a day.
#[derive(Clone, Debug)]
pub struct Idempotency {
    /// The client's key.
    pub key: String,
    /// Hash of the whole request.
    pub request_hash: String,
}

/// The outcome of a submission.
#[derive(Clone, Debug, PartialEq)]
pub enum Submitted {
    /// Accepted, durably.
    New(Job),
    /// The same request was accepted before; this is the current state of its job.
    Replayed(Job),
    /// The idempotency key belongs to another request.
    OtherRequest,
    /// The tenant already has the maximum number of waiting jobs.
    QueueFull,
    /// The sample's training does not exist, or is in this other state than succeeded.
    NoParent(Option<State>),
    /// An operator disabled or deleted the tenant.
    Disabled,
}

/// Conditions on the jobs to list; `None` means any.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Of this kind.
    pub kind: Option<Kind>,
    /// In this state.
    pub state: Option<State>,
    /// Trainings of this class.
    pub class_name: Option<String>,
    /// Accepted later than this, in milliseconds since 1970.
    pub created_after_ms: Option<i64>,
    /// Samples drawn with this training.
    pub parent: Option<JobId>,
}

/// Lengths of the queue.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gauges {
    /// By kind, in the order of [`Kind::ALL`].
    pub kinds: Vec<Gauge>,
}

/// Length of the queue of one kind of jobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gauge {
    /// The kind.
    pub kind: Kind,
    /// Waiting jobs.
    pub queued: u64,
    /// Running jobs.
    pub running: u64,
    /// Age of the oldest waiting job in milliseconds; 0 if none waits.
    pub oldest_queued_ms: u64,
}
