//! JSON of jobs and artifacts as clients see them: never a lease, a tenant or an object's key.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;
use utoipa::ToSchema;

use super::problem::Problem;
use crate::job::{
    Fault, Job, JobId, Kind, ModelRef, Object, Progress, SampleSpec, Spec, State, TrainOptions, WaitingFor,
    Warning, WarningCode,
};
use crate::store::QueuePlace;

/// A time in RFC 3339.
pub(super) fn time(ms: i64) -> String {
    Timestamp::from_millisecond(ms).unwrap_or_default().to_string()
}

fn waiting_for(place: QueuePlace) -> WaitingFor {
    if place.served { WaitingFor::Turn } else { WaitingFor::Worker }
}

/// A training.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Job)]
pub(super) struct JobView<'a> {
    /// Its id.
    id: JobId,
    /// Always `train`.
    kind: Kind,
    /// Its state. `succeeded`, `failed` and `canceled` are final.
    state: State,
    /// Whether its cancellation was requested.
    cancel_requested: bool,
    /// The training that this one retries, which may be deleted by now; null unless it is a retry.
    retry_of: Option<JobId>,
    /// What it waits for; null unless it is queued, and in lists.
    waiting_for: Option<WaitingFor>,
    /// What its sender should know.
    warnings: Vec<Warning>,
    /// What kind of thing the product is.
    #[schema(min_length = 1, max_length = 64, example = "mug")]
    class_name: String,
    /// The model that is trained; null until a worker decides it, and for trainings of earlier versions.
    model: Option<ModelRef>,
    /// All options of the training, those included that were left out.
    #[schema(value_type = TrainOptions)]
    options: &'a RawValue,
    /// Seed of all its random numbers: as requested, or drawn by the server.
    #[schema(minimum = 0, maximum = 9_007_199_254_740_991_i64)]
    seed: u64,
    /// The photos as they were decoded, in order.
    photos: Vec<PhotoView>,
    /// Its progress; null before its first attempt and once it has ended.
    progress: Option<Progress>,
    /// Jobs before it in the queue, 0 for the next one; null unless it is queued, and in lists.
    #[schema(minimum = 0)]
    queue_position: Option<u64>,
    /// Attempts so far.
    #[schema(minimum = 0)]
    attempt: i64,
    /// Why it failed; null unless it did.
    error: Option<&'a Fault>,
    /// Facts about the result; null unless it succeeded.
    #[schema(value_type = Option<Object>)]
    result: Option<&'a Value>,
    /// When it was accepted.
    #[schema(format = DateTime, example = "2026-11-24T09:00:00.123Z")]
    created_at: String,
    /// When its first attempt started.
    #[schema(format = DateTime)]
    started_at: Option<String>,
    /// When it ended.
    #[schema(format = DateTime)]
    finished_at: Option<String>,
    /// URLs of related resources.
    links: JobLinks,
}

/// A photo as it was decoded.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = JobPhoto)]
pub(super) struct PhotoView {
    /// Pixels, upright.
    #[schema(minimum = 1)]
    width: u64,
    /// Pixels, upright.
    #[schema(minimum = 1)]
    height: u64,
    /// Warnings: `dark`, `uniform`, `blurry`, `duplicate`.
    warnings: Vec<String>,
}

/// URLs of a training.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct JobLinks {
    /// This resource.
    #[serde(rename = "self")]
    #[schema(format = "uri")]
    this: String,
    /// POST here to cancel it.
    #[schema(format = "uri")]
    cancel: String,
    /// POST here to retry it, once it failed or was canceled.
    #[schema(format = "uri")]
    retry: String,
    /// Its changes, as server-sent events.
    #[schema(format = "uri")]
    events: String,
    /// Its report.
    #[schema(format = "uri")]
    report: String,
    /// Its files.
    #[schema(format = "uri")]
    artifacts: String,
    /// POST here to draw pictures with it.
    #[schema(format = "uri")]
    sample: String,
}

/// Fields of a training's stored specification. The options, its largest part, are passed on unparsed.
#[derive(Deserialize)]
struct SpecFields<'a> {
    class_name: String,
    #[serde(default)]
    model: Option<ModelRef>,
    #[serde(default)]
    warnings: Vec<Warning>,
    #[serde(borrow)]
    options: &'a RawValue,
    seed: u64,
}

impl<'a> JobView<'a> {
    /// The JSON of a training.
    pub(super) fn of(job: &'a Job, place: Option<QueuePlace>, public_url: &str) -> Result<Self, Problem> {
        let mut spec: SpecFields =
            serde_json::from_str(&job.spec_json).map_err(|error| Problem::internal(&error))?;
        if place.is_some_and(|place| !place.served) {
            let message = "no running worker holds the model that this job needs, with all parts that it takes: it \
                           waits for one";
            spec.warnings.push(Warning::new(WarningCode::NoWorker, message));
        }
        let this = format!("{public_url}/v1/jobs/{}", job.id);
        let link = |name: &str| [&this, "/", name].concat();
        let links = JobLinks {
            cancel: link("cancel"),
            retry: link("retry"),
            events: link("events"),
            report: link("report"),
            artifacts: link("artifacts"),
            sample: link("sample"),
            this: this.clone(),
        };
        Ok(Self {
            id: job.id,
            kind: job.kind,
            state: job.state,
            cancel_requested: job.cancel_requested,
            retry_of: job.retry_of,
            waiting_for: place.map(waiting_for),
            warnings: spec.warnings,
            class_name: spec.class_name,
            model: spec.model,
            options: spec.options,
            seed: spec.seed,
            photos: job.photos.iter().map(PhotoView::of).collect(),
            progress: job.progress.clone().filter(|_| !job.state.is_terminal()),
            queue_position: place.map(|place| place.position),
            attempt: job.attempt,
            error: job.error.as_ref(),
            result: job.result.as_ref(),
            created_at: time(job.created_ms),
            started_at: job.started_ms.map(time),
            finished_at: job.finished_ms.map(time),
            links,
        })
    }
}

impl PhotoView {
    fn of(photo: &Object) -> Self {
        let warnings = photo.meta["warnings"].as_array().into_iter().flatten();
        Self {
            width: photo.meta["width"].as_u64().unwrap_or_default(),
            height: photo.meta["height"].as_u64().unwrap_or_default(),
            warnings: warnings.filter_map(|word| word.as_str().map(ToOwned::to_owned)).collect(),
        }
    }
}

/// Pictures drawn, or to be drawn, with a training's result.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Sample)]
pub(super) struct SampleView {
    /// Its id.
    id: JobId,
    /// Always `sample`.
    kind: Kind,
    /// The training that it draws with.
    job_id: JobId,
    /// The sample that this one retries, which may be deleted by now; null unless it is a retry.
    retry_of: Option<JobId>,
    /// Its state. `succeeded`, `failed` and `canceled` are final.
    state: State,
    /// Whether its cancellation was requested.
    cancel_requested: bool,
    /// What it waits for; null unless it is queued, and in lists.
    waiting_for: Option<WaitingFor>,
    /// What is drawn, defaults included; the seed is that of the first picture.
    spec: SampleSpec,
    /// The pictures, in the order of the prompts; empty until it succeeded, and in lists.
    images: Vec<ImageView>,
    /// Its progress; null before its first attempt and once it has ended.
    progress: Option<Progress>,
    /// Jobs before it in the queue, 0 for the next one; null unless it is queued, and in lists.
    #[schema(minimum = 0)]
    queue_position: Option<u64>,
    /// Attempts so far.
    #[schema(minimum = 0)]
    attempt: i64,
    /// Why it failed; null unless it did.
    error: Option<Fault>,
    /// When it was accepted.
    #[schema(format = DateTime, example = "2026-11-24T09:00:00.123Z")]
    created_at: String,
    /// When its first attempt started.
    #[schema(format = DateTime)]
    started_at: Option<String>,
    /// When it ended.
    #[schema(format = DateTime)]
    finished_at: Option<String>,
    /// URLs of related resources.
    links: SampleLinks,
}

/// URLs of a sample.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct SampleLinks {
    /// This resource.
    #[serde(rename = "self")]
    #[schema(format = "uri")]
    this: String,
    /// POST here to cancel it.
    #[schema(format = "uri")]
    cancel: String,
    /// POST here to retry it, once it failed or was canceled.
    #[schema(format = "uri")]
    retry: String,
    /// The training that it draws with.
    #[schema(format = "uri")]
    job: String,
}

/// A picture.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Image)]
pub(super) struct ImageView {
    /// Its prompt.
    prompt: String,
    /// The seed that reproduces it.
    #[schema(minimum = 0)]
    seed: u64,
    /// Pixels.
    #[schema(minimum = 1)]
    width: u64,
    /// Pixels.
    #[schema(minimum = 1)]
    height: u64,
    /// Its media type.
    #[schema(example = "image/png")]
    content_type: String,
    /// Bytes.
    #[schema(minimum = 0)]
    size: u64,
    /// SHA-256 of the file.
    #[schema(pattern = "^[0-9a-f]{64}$")]
    sha256: String,
    /// Where to fetch it; needs no key.
    #[schema(format = "uri")]
    url: String,
    /// When the URL stops working.
    #[schema(format = DateTime)]
    expires_at: String,
}

impl SampleView {
    /// The JSON of a sample; none if the job is a training.
    pub(super) fn of(
        job: &Job,
        images: Vec<ImageView>,
        place: Option<QueuePlace>,
        public_url: &str,
    ) -> Option<Self> {
        let (Ok(Spec::Sample(spec)), Some(parent)) = (job.spec(), job.parent) else { return None };
        let this = format!("{public_url}/v1/samples/{}", job.id);
        let (cancel, retry) = (format!("{this}/cancel"), format!("{this}/retry"));
        let links = SampleLinks { this, cancel, retry, job: format!("{public_url}/v1/jobs/{parent}") };
        Some(Self {
            id: job.id,
            kind: Kind::Sample,
            job_id: parent,
            state: job.state,
            cancel_requested: job.cancel_requested,
            retry_of: job.retry_of,
            waiting_for: place.map(waiting_for),
            spec,
            images,
            progress: job.progress.clone().filter(|_| !job.state.is_terminal()),
            queue_position: place.map(|place| place.position),
            attempt: job.attempt,
            error: job.error.clone(),
            created_at: time(job.created_ms),
            started_at: job.started_ms.map(time),
            finished_at: job.finished_ms.map(time),
            links,
        })
    }
}

impl ImageView {
    pub(super) fn of(image: &Object, url: String, expires_at: String) -> Self {
        let number = |name: &str| image.meta[name].as_u64().unwrap_or_default();
        Self {
            prompt: image.meta["prompt"].as_str().unwrap_or_default().to_owned(),
            seed: number("seed"),
            width: number("width"),
            height: number("height"),
            content_type: image.content_type.clone(),
            size: image.size,
            sha256: image.sha256.clone(),
            url,
            expires_at,
        }
    }
}

/// A file of a job.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Artifact)]
pub(super) struct ArtifactView {
    /// Its name within the job.
    #[schema(example = "weights.safetensors")]
    name: String,
    /// Bytes.
    #[schema(minimum = 0)]
    size: u64,
    /// SHA-256 of the file.
    #[schema(pattern = "^[0-9a-f]{64}$")]
    sha256: String,
    /// Its media type.
    content_type: String,
    /// Where to fetch it; needs no key.
    #[schema(format = "uri")]
    url: String,
    /// When the URL stops working.
    #[schema(format = DateTime)]
    expires_at: String,
}

impl ArtifactView {
    pub(super) fn of(object: Object, url: String, expires_at: String) -> Self {
        let Object { name, size, sha256, content_type, .. } = object;
        Self { name, size, sha256, content_type, url, expires_at }
    }
}
