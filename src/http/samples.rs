//! `/v1/samples`: handlers of samples, the pictures drawn with a training's result.

use axum::Json;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use tracing::Span;
use utoipa::ToSchema;

use super::auth::{Reader, Writer};
use super::conditional::conditional_json;
use super::extract::{ApiQuery, PathId, PathIdAndName};
use super::files::{redirect, signed_url};
use super::idempotency::idempotency;
use super::json::json_body;
use super::long_poll::{long_poll, wait_until};
use super::pagination::{Page, PageQuery};
use super::prefer::preferred_wait;
use super::problem::Problem;
use super::state::AppState;
use super::submit::{Accepted, job_response, random_seed, replay, resubmit, submit};
use super::view::{ImageView, SampleView};
use crate::job::{Job, JobId, Kind, Object, SampleSpec, Spec, State as JobState};
use crate::store::{NewJob, Origin, QueuePlace};
use crate::telemetry;

/// Draws pictures with a finished training
///
/// Queued like a training, but never behind one. With `Prefer: wait=N` the answer waits up to N seconds for the end:
/// it is 200 if the sample has ended, else 202.
#[utoipa::path(
    post, path = "/v1/jobs/{id}/sample", tag = "samples",
    params(
        ("id" = Uuid, Path, description = "The training"),
        ("Prefer" = Option<String>, Header, description = "`wait=N`: seconds, at most 50; more counts as 50"),
        ("Idempotency-Key" = Option<String>, Header, description = "Identifies this request for 24 hours.",
            min_length = 1, max_length = 255, pattern = "^[!-~]+$"),
    ),
    request_body = SampleSpec,
    responses(
        (status = 200, description = "Ended", body = SampleView, headers(
            ("Location" = String, description = "The sample"))),
        (status = 202, description = "Accepted", body = SampleView, headers(
            ("Location" = String, description = "The sample"),
            ("Retry-After" = u64, description = "Seconds to wait before polling"),
            ("Idempotent-Replayed" = Option<bool>, description = "The same request was accepted before"))),
    ),
    extensions(("x-problems" = json!(["bad-parameter", "bad-body", "not-found", "body-timeout", "wrong-state",
        "body-too-large", "media-type", "field", "idempotency-key-reused", "queue-full"]))),
)]
pub(super) async fn create_sample(
    State(app): State<AppState>,
    mut writer: Writer,
    PathId(parent): PathId,
    headers: HeaderMap,
    request: Request,
) -> Result<Response, Problem> {
    writer.release_permit();
    let (spec, bytes) = json_body::<SampleSpec>(&app, writer.tenant, request).await?;
    writer.acquire_permit(&app).await?;
    let name = parent.to_string();
    let idempotency = idempotency(&headers, [name.as_bytes(), &bytes])?;
    let accepted = if let Some(existing) = replay(&app, writer.tenant, idempotency.as_ref()).await? {
        existing
    } else {
        let new = NewJob {
            id: JobId::new(),
            tenant: writer.tenant,
            parent: Some(parent),
            spec: Spec::Sample(spec.complete(random_seed()?)?),
            photos: Vec::new(),
            priority: 0,
            max_attempts: app.settings.attempts_max,
            idempotency,
            queue_max: app.settings.queue_max,
            origin: Origin { trace: telemetry::traceparent(&Span::current()), ..Origin::default() },
        };
        submit(&app, new).await?
    };
    let Accepted { mut job, replayed } = accepted;
    if let Some(time) = preferred_wait(&headers) {
        job = wait_until(&app, &mut writer, (job, None), time, |job, _| job.state.is_terminal()).await?;
    }
    let status = if job.state.is_terminal() { StatusCode::OK } else { StatusCode::ACCEPTED };
    let location = format!("{}/v1/samples/{}", app.settings.public_url, job.id);
    let place = app.store.queue_place(&job).await?;
    Ok(job_response(status, &location, replayed, view(&app, &job, place).await?))
}

/// The sample with its pictures, once it has succeeded.
async fn view(app: &AppState, job: &Job, place: Option<QueuePlace>) -> Result<SampleView, Problem> {
    let mut images = Vec::new();
    for image in pictures(app, job).await? {
        let (url, expires_at) = signed_url(app, &image).await?;
        images.push(ImageView::of(&image, url, expires_at));
    }
    let view = SampleView::of(job, images, place, &app.settings.public_url);
    view.ok_or_else(|| Problem::not_found("sample"))
}

/// Its pictures in order: `image-10` after `image-9`.
async fn pictures(app: &AppState, job: &Job) -> Result<Vec<Object>, Problem> {
    if job.state != JobState::Succeeded {
        return Ok(Vec::new());
    }
    let mut artifacts = app.store.artifacts(job.tenant, job.id).await?;
    artifacts.retain(|artifact| artifact.content_type.starts_with("image/"));
    artifacts.sort_by(|a, b| (a.name.len(), &a.name).cmp(&(b.name.len(), &b.name)));
    Ok(artifacts)
}

/// A page of samples, the newest first.
#[derive(Serialize, ToSchema)]
pub(super) struct SamplePage {
    /// The samples, without their pictures.
    data: Vec<SampleView>,
    /// Cursor of the next page; null on the last.
    next_cursor: Option<String>,
}

/// Lists samples, the newest first
#[utoipa::path(
    get, path = "/v1/samples", tag = "samples", params(PageQuery),
    responses((status = 200, description = "A page", body = SamplePage, headers(
        ("Link" = Option<String>, description = "The next page, as `rel=\"next\"`")))),
    extensions(("x-problems" = json!(["bad-parameter"]))),
)]
pub(super) async fn list_samples(
    State(app): State<AppState>,
    reader: Reader,
    ApiQuery(query): ApiQuery<PageQuery>,
) -> Result<Response, Problem> {
    let page = Page::read(&app, reader.tenant, &query, Kind::Sample).await?;
    let of = |job| SampleView::of(job, Vec::new(), None, &app.settings.public_url);
    let data = page.jobs.iter().filter_map(of).collect();
    let base = format!("{}/v1/samples", app.settings.public_url);
    let next_cursor = page.next_cursor.clone();
    Ok(Page::respond(page.next_cursor.as_deref(), &query, &base, SamplePage { data, next_cursor }))
}

/// Gets a sample
///
/// With `If-None-Match` and `Prefer: wait=N` as for a training. The pictures' URLs are new with every answer.
#[utoipa::path(
    get, path = "/v1/samples/{id}", tag = "samples",
    params(
        ("id" = Uuid, Path, description = "The sample"),
        ("If-None-Match" = Option<String>, Header, description = "The `ETag` of what the client has"),
        ("Prefer" = Option<String>, Header, description = "`wait=N`: seconds, at most 50; more counts as 50"),
    ),
    responses(
        (status = 200, description = "The sample", body = SampleView, headers(
            ("ETag" = String, description = "Its version"),
            ("Retry-After" = Option<u64>, description = "Seconds to wait before polling again, until it ends"))),
        (status = 304, description = "Unchanged"),
    ),
    extensions(("x-problems" = json!(["not-found"]))),
)]
pub(super) async fn get_sample(
    State(app): State<AppState>,
    mut reader: Reader,
    PathId(id): PathId,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let (job, place) = long_poll(&app, &mut reader, id, Kind::Sample, &headers).await?;
    Ok(conditional_json(&headers, &job, place, view(&app, &job, place).await?))
}

/// Fetches one of a sample's pictures
#[utoipa::path(
    get, path = "/v1/samples/{id}/images/{n}", tag = "samples",
    params(
        ("id" = Uuid, Path, description = "The sample"),
        ("n" = u32, Path, description = "The picture's index, from 0", minimum = 0, maximum = 127),
    ),
    responses((status = 307, description = "A redirect to the file, valid for a limited time", headers(
        ("Location" = String, description = "A URL that needs no key")))),
    extensions(("x-problems" = json!(["not-found"]))),
)]
pub(super) async fn get_image(
    State(app): State<AppState>,
    reader: Reader,
    PathIdAndName(id, n): PathIdAndName,
) -> Result<Response, Problem> {
    let job = app.find_job(reader.tenant, id, Kind::Sample).await?;
    let n: usize = n.parse().map_err(|_| Problem::not_found("image"))?;
    let pictures = pictures(&app, &job).await?;
    redirect(&app, pictures.get(n).ok_or_else(|| Problem::not_found("image"))?).await
}

/// Deletes a sample and its pictures
#[utoipa::path(
    delete, path = "/v1/samples/{id}", tag = "samples", params(("id" = Uuid, Path, description = "The sample")),
    responses((status = 204, description = "Deleted")),
    extensions(("x-problems" = json!(["not-found"]))),
)]
pub(super) async fn delete_sample(
    State(app): State<AppState>,
    writer: Writer,
    PathId(id): PathId,
) -> Result<StatusCode, Problem> {
    app.find_job(writer.tenant, id, Kind::Sample).await?;
    if app.store.delete(writer.tenant, id).await? {
        return Ok(StatusCode::NO_CONTENT);
    }
    Err(Problem::not_found("sample"))
}

/// Cancels a sample
///
/// A queued sample ends at once, one that is being drawn within a step. One that has ended stays as it is.
#[utoipa::path(
    post, path = "/v1/samples/{id}/cancel", tag = "samples", params(("id" = Uuid, Path, description = "The sample")),
    responses((status = 202, description = "The sample as it is now", body = SampleView)),
    extensions(("x-problems" = json!(["not-found"]))),
)]
pub(super) async fn cancel_sample(
    State(app): State<AppState>,
    writer: Writer,
    PathId(id): PathId,
) -> Result<Response, Problem> {
    app.find_job(writer.tenant, id, Kind::Sample).await?;
    let job = app.store.cancel(writer.tenant, id).await?.ok_or_else(|| Problem::not_found("sample"))?;
    Ok((StatusCode::ACCEPTED, Json(view(&app, &job, None).await?)).into_response())
}

/// Retries a sample
///
/// Queues a failed or canceled sample once more, as a new sample with the same prompts and seeds.
#[utoipa::path(
    post, path = "/v1/samples/{id}/retry", tag = "samples",
    params(
        ("id" = Uuid, Path, description = "The sample that failed or was canceled"),
        ("Idempotency-Key" = Option<String>, Header, description = "Identifies this request for 24 hours.",
            min_length = 1, max_length = 255, pattern = "^[!-~]+$"),
    ),
    responses((status = 202, description = "The new sample", body = SampleView, headers(
        ("Location" = String, description = "The new sample"),
        ("Retry-After" = u64, description = "Seconds to wait before polling"),
        ("Idempotent-Replayed" = Option<bool>, description = "The same request was accepted before"),
    ))),
    extensions(("x-problems" = json!(["bad-parameter", "not-found", "wrong-state", "idempotency-key-reused", "queue-full"]))),
)]
pub(super) async fn retry_sample(
    State(app): State<AppState>,
    mut writer: Writer,
    PathId(id): PathId,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let Accepted { job, replayed } = resubmit(&app, &mut writer, id, Kind::Sample, &headers).await?;
    let location = format!("{}/v1/samples/{}", app.settings.public_url, job.id);
    Ok(job_response(StatusCode::ACCEPTED, &location, replayed, view(&app, &job, None).await?))
}
