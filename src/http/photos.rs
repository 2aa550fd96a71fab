//! `/v1/photos/inspect`: checks photos without creating a job.

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use serde::Serialize;
use utoipa::ToSchema;

use super::auth::Writer;
use super::models::class_warnings;
use super::problem::{Kind, Problem, TYPE_PREFIX};
use super::product_detector::DetectedProduct;
use super::state::AppState;
use super::upload::{FormKind, decode, receive};
use crate::job::Warning;
use crate::photo::{Inspection, duplicates};

/// The form of photos to inspect.
#[derive(ToSchema)]
#[schema(as = Photos)]
#[expect(dead_code, reason = "it describes a form, which is read part by part")]
pub(super) struct PhotosForm {
    /// Photos: PNG, JPEG or WebP.
    #[schema(value_type = Vec<String>, min_items = 1, max_items = 5)]
    images: Vec<Vec<u8>>,
    /// What kind of thing the product is, to see whether the model knows it.
    #[schema(min_length = 1, max_length = 64, example = "mug")]
    class_name: Option<String>,
    /// The model that would be trained, as in a job.
    #[schema(max_length = 64)]
    model: Option<String>,
}

/// The inspected photos.
#[derive(Serialize, ToSchema)]
pub(super) struct Inspections {
    /// One for each photo, in order.
    photos: Vec<Inspected>,
    /// Pairs of indices, from 0, of photos that show the same picture.
    duplicates: Vec<(usize, usize)>,
    /// Warnings that a job with this class and model would have.
    warnings: Vec<Warning>,
}

/// An inspected photo.
#[derive(Serialize, ToSchema)]
struct Inspected {
    /// Whether a job would accept it.
    accepted: bool,
    /// Why not; null if it would.
    problem: Option<PhotoProblem>,
    /// What was measured of it; null if it cannot be decoded.
    inspection: Option<Inspection>,
    /// Where the product is in it; null if it cannot be decoded, or this server has no model to find it.
    product: Option<DetectedProduct>,
}

/// Why a photo would be refused.
#[derive(Serialize, ToSchema)]
#[schema(as = Refused)]
struct PhotoProblem {
    /// URI of the type of problem, as in the answer to a job with this photo.
    #[schema(example = "/problems/image-too-small")]
    r#type: String,
    /// What was sent and what is expected, in one line.
    detail: String,
}

/// Inspects photos without storing them
///
/// For each photo: whether a job would accept it, warnings (too dark, of one colour, blurry, a duplicate), and where
/// the product was found in it; with a class, whether the model knows it. Nothing is stored or queued.
#[utoipa::path(
    post, path = "/v1/photos/inspect", tag = "photos",
    request_body(content = PhotosForm, content_type = "multipart/form-data"),
    responses((status = 200, description = "The inspected photos", body = Inspections)),
    extensions(("x-problems" = json!(["bad-body", "body-timeout", "body-too-large", "media-type", "field",
        "decoder-busy"]))),
)]
pub(super) async fn inspect_photos(
    State(app): State<AppState>,
    mut writer: Writer,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Inspections>, Problem> {
    let (upload, admitted) = receive(&app, &mut writer, &headers, body, FormKind::Photos).await?;
    if upload.images.is_empty() {
        return Err(Problem::new(Kind::Field, "/images: wanted 1 to 5 photos, got 0").at("/images"));
    }
    let warnings = match upload.class_name()? {
        Some(class_name) => class_warnings(&app, &class_name, upload.model()?.as_deref()).await?,
        None => Vec::new(),
    };
    let mut slot = admitted.wait_for_slot(upload.bytes()).await?;
    let mut photos = Vec::new();
    for image in upload.images {
        photos.push(match decode(&app, &image).await? {
            Ok(photo) => Inspected {
                accepted: true,
                problem: None,
                inspection: Some(photo.inspection),
                product: detect_product(&app, photo.png).await?,
            },
            Err(refusal) if refusal.status == 503 => return Err(refusal.into()),
            Err(refusal) => {
                let r#type = format!("{TYPE_PREFIX}{}", refusal.code);
                let problem = Some(PhotoProblem { r#type, detail: refusal.message });
                Inspected { accepted: false, problem, inspection: None, product: None }
            }
        });
        slot.photo_done(image.len());
    }
    let (indices, inspections): (Vec<_>, Vec<_>) =
        photos.iter().enumerate().filter_map(|(n, photo)| Some((n, photo.inspection.clone()?))).unzip();
    let duplicates = duplicates(&inspections).into_iter().map(|(a, b)| (indices[a], indices[b])).collect();
    Ok(Json(Inspections { photos, duplicates, warnings }))
}

/// Finds the product, on a thread for blocking work.
async fn detect_product(app: &AppState, png: Vec<u8>) -> Result<Option<DetectedProduct>, Problem> {
    let Some(detector) = app.detector.clone() else { return Ok(None) };
    let detected = tokio::task::spawn_blocking(move || detector.detect(&png)).await;
    let detected = detected.map_err(|error| Problem::internal(&error))?;
    detected.map(Some).map_err(|error| Problem::internal(&*error))
}
