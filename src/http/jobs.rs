//! `/v1/jobs`: handlers of trainings.

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use tracing::{Instrument, Span};
use utoipa::ToSchema;

use super::auth::{Reader, Writer};
use super::conditional::conditional_json;
use super::extract::{ApiQuery, PathId, PathIdAndName};
use super::files::{redirect, signed_url};
use super::long_poll::long_poll;
use super::models::resolve;
use super::pagination::{Page, PageQuery};
use super::problem::{Kind as ProblemKind, Problem};
use super::spool::Spooled;
use super::state::AppState;
use super::submit::{Accepted, job_response, replay, resubmit, submit};
use super::upload::{FormKind, receive, store_photos};
use super::upload_queue::ProcessingSlot;
use super::view::{ArtifactView, JobView};
use crate::blobs::Scope;
use crate::job::{Job, JobId, Kind, REPORT, Spec, State as JobState, TenantId, TrainOptions, TrainSpec};
use crate::report::Report;
use crate::store::{Idempotency, NewJob, Origin, QueuePlace};
use crate::telemetry;

/// The form of a new training.
#[derive(ToSchema)]
#[schema(as = NewJob)]
#[expect(dead_code, reason = "it describes a form, which is read part by part")]
pub(super) struct JobForm {
    /// Photos of one product: PNG, JPEG or WebP.
    #[schema(value_type = Vec<String>, min_items = 3, max_items = 5)]
    images: Vec<Vec<u8>>,
    /// What kind of thing the product is.
    #[schema(min_length = 1, max_length = 64, example = "mug")]
    class_name: String,
    /// The model to train, by its name or SHA-256 in `/v1/models`; the only one or the service's default if not given.
    #[schema(max_length = 64, example = "sd15")]
    model: Option<String>,
    /// How it is trained, as JSON. Options that are left out are those of the model for the method, in `/v1/models`.
    options: Option<TrainOptions>,
}

/// Trains a model on photos of a product
///
/// Returns as soon as the job is queued; follow `Location`. The photos are decoded first, so one that cannot be used is
/// refused at once. A refused request leaves nothing behind. Send an `Idempotency-Key` to repeat safely a request whose
/// answer was lost.
#[utoipa::path(
    post, path = "/v1/jobs", tag = "jobs",
    params(("Idempotency-Key" = Option<String>, Header, description = "Identifies this request for 24 hours.",
        min_length = 1, max_length = 255, pattern = "^[!-~]+$")),
    request_body(content = JobForm, content_type = "multipart/form-data"),
    responses((status = 202, description = "Accepted", body = JobView, headers(
        ("Location" = String, description = "The job"),
        ("Retry-After" = u64, description = "Seconds to wait before polling"),
        ("Idempotent-Replayed" = Option<bool>, description = "The same request was accepted before"),
    ))),
    extensions(("x-problems" = json!(["bad-parameter", "bad-body", "body-timeout", "body-too-large", "media-type",
        "image-type-unsupported", "field", "image-empty", "image-too-large", "image-too-small", "image-aspect",
        "animated-not-supported", "image-color-unsupported", "image-too-complex", "image-damaged",
        "idempotency-key-reused", "queue-full", "decoder-busy", "storage-full"]))),
)]
pub(super) async fn create_job(
    State(app): State<AppState>,
    mut writer: Writer,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let (upload, admitted) = receive(&app, &mut writer, &headers, body, FormKind::Job).await?;
    let idempotency = upload.idempotency(&headers).await?;
    // Checked before waiting for a slot, and again after: it may be accepted meanwhile.
    let accepted = if let Some(existing) = replay(&app, writer.tenant, idempotency.as_ref()).await? {
        existing
    } else {
        let spec = resolve(&app, upload.request()?).await?;
        let slot = admitted.wait_for_slot(upload.bytes()).await?;
        // Runs to its end even if the client disconnects: canceled between the objects and the row, it would leave
        // objects that no row names.
        let work = {
            let (app, tenant) = (app.clone(), writer.tenant);
            async move { create(&app, tenant, spec, upload.images, idempotency, slot).await }
        };
        let accepted = tokio::spawn(work.in_current_span()).await;
        accepted.map_err(|error| Problem::internal(&error))??
    };
    let Accepted { job, replayed } = accepted;
    let view = view(&app, &job, app.store.queue_place(&job).await?)?;
    Ok(job_response(
        StatusCode::ACCEPTED,
        &format!("{}/v1/jobs/{}", app.settings.public_url, job.id),
        replayed,
        view,
    ))
}

async fn create(
    app: &AppState,
    tenant: TenantId,
    spec: TrainSpec,
    images: Vec<Spooled>,
    idempotency: Option<Idempotency>,
    slot: ProcessingSlot,
) -> Result<Accepted, Problem> {
    if let Some(existing) = replay(app, tenant, idempotency.as_ref()).await? {
        return Ok(existing);
    }
    let id = JobId::new();
    let accepted = store_and_submit(app, tenant, id, spec, images, idempotency, slot).await;
    match &accepted {
        Ok(accepted) if accepted.job.id == id => {}
        // The row may be there, or may still appear: then it needs its photos.
        Err(problem) if problem.kind() == ProblemKind::OutcomeUnknown => {
            tracing::warn!(job.id = %id, "submission outcome unknown: photos kept, for a sweep if there is no job");
        }
        _ => discard(app, tenant, id).await,
    }
    accepted
}

async fn store_and_submit(
    app: &AppState,
    tenant: TenantId,
    id: JobId,
    spec: TrainSpec,
    images: Vec<Spooled>,
    idempotency: Option<Idempotency>,
    mut slot: ProcessingSlot,
) -> Result<Accepted, Problem> {
    let tenant_created_ms =
        app.store.tenant_created_ms(tenant).await?.ok_or_else(Problem::tenant_disabled)?;
    let photos = store_photos(app, tenant, id, images, &mut slot).await?;
    let job = NewJob {
        id,
        tenant,
        parent: None,
        priority: spec.options.priority,
        spec: Spec::Train(Box::new(spec)),
        photos,
        max_attempts: app.settings.attempts_max,
        idempotency,
        queue_max: app.settings.queue_max,
        origin: Origin {
            trace: telemetry::traceparent(&Span::current()),
            tenant_created_ms: Some(tenant_created_ms),
            ..Origin::default()
        },
    };
    submit(app, job).await
}

/// Deletes the photos of a job that was certainly not accepted.
async fn discard(app: &AppState, tenant: TenantId, id: JobId) {
    if let Err(error) = app.blobs.delete_all(&Scope::job(tenant, id)).await {
        tracing::warn!(job.id = %id, %error, "cannot delete the photos of a refused job");
    }
}

fn view<'a>(app: &AppState, job: &'a Job, place: Option<QueuePlace>) -> Result<JobView<'a>, Problem> {
    JobView::of(job, place, &app.settings.public_url)
}

/// A page of trainings, the newest first.
#[derive(Serialize, ToSchema)]
pub(super) struct JobPage<'a> {
    /// The trainings.
    data: Vec<JobView<'a>>,
    /// Cursor of the next page; null on the last.
    next_cursor: Option<String>,
}

/// Lists trainings, the newest first
#[utoipa::path(
    get, path = "/v1/jobs", tag = "jobs", params(PageQuery),
    responses((status = 200, description = "A page", body = JobPage, headers(
        ("Link" = Option<String>, description = "The next page, as `rel=\"next\"`")))),
    extensions(("x-problems" = json!(["bad-parameter"]))),
)]
pub(super) async fn list_jobs(
    State(app): State<AppState>,
    reader: Reader,
    ApiQuery(query): ApiQuery<PageQuery>,
) -> Result<Response, Problem> {
    let page = Page::read(&app, reader.tenant, &query, Kind::Train).await?;
    let data = page.jobs.iter().map(|job| view(&app, job, None)).collect::<Result<_, _>>()?;
    let base = format!("{}/v1/jobs", app.settings.public_url);
    let next_cursor = page.next_cursor.clone();
    Ok(Page::respond(page.next_cursor.as_deref(), &query, &base, JobPage { data, next_cursor }))
}

/// Gets a training
///
/// With `If-None-Match` an unchanged training is answered with 304. With `Prefer: wait=N` the answer waits up to N
/// seconds: for a change if there is an `If-None-Match`, else for the training's end. Under load it waits for a shorter
/// time.
#[utoipa::path(
    get, path = "/v1/jobs/{id}", tag = "jobs",
    params(
        ("id" = Uuid, Path, description = "The training"),
        ("If-None-Match" = Option<String>, Header, description = "The `ETag` of what the client has"),
        ("Prefer" = Option<String>, Header, description = "`wait=N`: seconds, at most 50; more counts as 50"),
    ),
    responses(
        (status = 200, description = "The training", body = JobView, headers(
            ("ETag" = String, description = "Its version"),
            ("Retry-After" = Option<u64>, description = "Seconds to wait before polling again, until it ends"))),
        (status = 304, description = "Unchanged"),
    ),
    extensions(("x-problems" = json!(["not-found"]))),
)]
pub(super) async fn get_job(
    State(app): State<AppState>,
    mut reader: Reader,
    PathId(id): PathId,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let (job, place) = long_poll(&app, &mut reader, id, Kind::Train, &headers).await?;
    Ok(conditional_json(&headers, &job, place, view(&app, &job, place)?))
}

/// Deletes a training, its photos, its results and its samples
///
/// A running training is canceled. The training is gone at once; its objects are deleted soon after.
#[utoipa::path(
    delete, path = "/v1/jobs/{id}", tag = "jobs", params(("id" = Uuid, Path, description = "The training")),
    responses((status = 204, description = "Deleted")),
    extensions(("x-problems" = json!(["not-found"]))),
)]
pub(super) async fn delete_job(
    State(app): State<AppState>,
    writer: Writer,
    PathId(id): PathId,
) -> Result<StatusCode, Problem> {
    app.find_job(writer.tenant, id, Kind::Train).await?;
    if app.store.delete(writer.tenant, id).await? {
        return Ok(StatusCode::NO_CONTENT);
    }
    Err(Problem::not_found("job"))
}

/// Cancels a training
///
/// A queued training ends at once, a running one within a step. One that has ended stays as it is.
#[utoipa::path(
    post, path = "/v1/jobs/{id}/cancel", tag = "jobs", params(("id" = Uuid, Path, description = "The training")),
    responses((status = 202, description = "The training as it is now", body = JobView)),
    extensions(("x-problems" = json!(["not-found"]))),
)]
pub(super) async fn cancel_job(
    State(app): State<AppState>,
    writer: Writer,
    PathId(id): PathId,
) -> Result<Response, Problem> {
    app.find_job(writer.tenant, id, Kind::Train).await?;
    let job = app.store.cancel(writer.tenant, id).await?.ok_or_else(|| Problem::not_found("job"))?;
    Ok((StatusCode::ACCEPTED, Json(view(&app, &job, None)?)).into_response())
}

/// Retries a training
///
/// Queues a failed or canceled training once more, as a new training, since one that has ended never changes. Class
/// name, options, seed and photos are the same; the photos are not sent again. Each of the two can be deleted
/// without the other.
#[utoipa::path(
    post, path = "/v1/jobs/{id}/retry", tag = "jobs",
    params(
        ("id" = Uuid, Path, description = "The training that failed or was canceled"),
        ("Idempotency-Key" = Option<String>, Header, description = "Identifies this request for 24 hours.",
            min_length = 1, max_length = 255, pattern = "^[!-~]+$"),
    ),
    responses((status = 202, description = "The new training", body = JobView, headers(
        ("Location" = String, description = "The new training"),
        ("Retry-After" = u64, description = "Seconds to wait before polling"),
        ("Idempotent-Replayed" = Option<bool>, description = "The same request was accepted before"),
    ))),
    extensions(("x-problems" = json!(["bad-parameter", "not-found", "wrong-state", "idempotency-key-reused", "queue-full",
        "artifact-missing", "artifact-damaged", "storage-full"]))),
)]
pub(super) async fn retry_job(
    State(app): State<AppState>,
    mut writer: Writer,
    PathId(id): PathId,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let Accepted { job, replayed } = resubmit(&app, &mut writer, id, Kind::Train, &headers).await?;
    let location = format!("{}/v1/jobs/{}", app.settings.public_url, job.id);
    Ok(job_response(StatusCode::ACCEPTED, &location, replayed, view(&app, &job, None)?))
}

/// Gets a training's report
///
/// How the result was made: settings, hashes, seeds, prompts, losses, metrics.
#[utoipa::path(
    get, path = "/v1/jobs/{id}/report", tag = "jobs", params(("id" = Uuid, Path, description = "The training")),
    responses((status = 200, description = "The report", body = Report)),
    extensions(("x-problems" = json!(["not-found", "wrong-state", "artifact-missing", "artifact-damaged"]))),
)]
pub(super) async fn get_report(
    State(app): State<AppState>,
    reader: Reader,
    PathId(id): PathId,
) -> Result<Response, Problem> {
    let job = app.find_job(reader.tenant, id, Kind::Train).await?;
    let report = app.store.artifact(reader.tenant, id, REPORT).await?;
    let report = report.ok_or_else(|| match job.state {
        JobState::Succeeded => Problem::not_found("report"),
        state => Problem::new(ProblemKind::WrongState, format!("the job is {state}; wanted succeeded")),
    })?;
    let bytes = app.blobs.get(&report).await?;
    Ok(([(header::CONTENT_TYPE, "application/json")], bytes).into_response())
}

/// A training's files.
#[derive(Serialize, ToSchema)]
pub(super) struct ArtifactList {
    /// The files, by name.
    data: Vec<ArtifactView>,
}

/// Lists a training's files
///
/// The weights, the report, the pictures drawn with it; while it runs, those that are ready.
#[utoipa::path(
    get, path = "/v1/jobs/{id}/artifacts", tag = "jobs", params(("id" = Uuid, Path, description = "The training")),
    responses((status = 200, description = "The files", body = ArtifactList)),
    extensions(("x-problems" = json!(["not-found"]))),
)]
pub(super) async fn list_artifacts(
    State(app): State<AppState>,
    reader: Reader,
    PathId(id): PathId,
) -> Result<Json<ArtifactList>, Problem> {
    app.find_job(reader.tenant, id, Kind::Train).await?;
    let mut data = Vec::new();
    for object in app.store.artifacts(reader.tenant, id).await? {
        let (url, expires_at) = signed_url(&app, &object).await?;
        data.push(ArtifactView::of(object, url, expires_at));
    }
    Ok(Json(ArtifactList { data }))
}

/// Fetches one of a training's files
#[utoipa::path(
    get, path = "/v1/jobs/{id}/artifacts/{name}", tag = "jobs",
    params(
        ("id" = Uuid, Path, description = "The training"),
        ("name" = String, Path, description = "The file's name", example = "weights.safetensors"),
    ),
    responses((status = 307, description = "A redirect to the file, valid for a limited time", headers(
        ("Location" = String, description = "A URL that needs no key")))),
    extensions(("x-problems" = json!(["not-found"]))),
)]
pub(super) async fn get_artifact(
    State(app): State<AppState>,
    reader: Reader,
    PathIdAndName(id, name): PathIdAndName,
) -> Result<Response, Problem> {
    app.find_job(reader.tenant, id, Kind::Train).await?;
    let artifact = app.store.artifact(reader.tenant, id, &name).await?;
    redirect(&app, &artifact.ok_or_else(|| Problem::not_found("artifact"))?).await
}
