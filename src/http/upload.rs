//! A form of photos: read whole or refused, then decoded and stored.

use axum::body::{Body, Bytes};
use axum::http::HeaderMap;
use serde_json::{Value, json};
use tokio::sync::SemaphorePermit;

use super::Front;
use super::form::Form;
use super::problem::{Kind, Problem};
use crate::blobs::Key;
use crate::job::{JobId, N_PHOTOS_MAX, Object, TenantId};
use crate::photo::{Inspection, duplicates};

/// Beside the photos: fields, boundaries, heads.
const REST_BYTES_MAX: usize = 1 << 20;
const CLASS_NAME_BYTES_MAX: usize = 256;
const OPTIONS_BYTES_MAX: usize = 16 * 1024;

/// The form's parts as they came.
#[derive(Debug, Default)]
pub(super) struct Upload {
    pub(super) images: Vec<Bytes>,
    pub(super) class_name: Option<Bytes>,
    pub(super) options: Option<Bytes>,
}

/// Which parts a form may have beside its images.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Fields {
    /// None.
    Images,
    /// `class_name` and `options`.
    Job,
}

/// A place among the uploads, each of which holds its photos in memory.
pub(super) fn place(front: &Front) -> Result<SemaphorePermit<'_>, Problem> {
    front.uploads.try_acquire().map_err(|_| Problem::new(Kind::Overloaded, "too many uploads at once"))
}

/// Reads the form. Stops at the first part that cannot be.
pub(super) async fn read(
    front: &Front,
    headers: &HeaderMap,
    body: Body,
    fields: Fields,
) -> Result<Upload, Problem> {
    let photo_bytes_max = front.settings.photo_bytes_max;
    let bytes_max = N_PHOTOS_MAX * photo_bytes_max + REST_BYTES_MAX;
    let mut form = Form::new(headers, body, bytes_max, front.settings.upload_time)?;
    let mut upload = Upload::default();
    while let Some(name) = form.next().await? {
        match (name.as_str(), fields) {
            ("images", _) => {
                let n = upload.images.len();
                if n == N_PHOTOS_MAX {
                    let detail = format!("/images: wanted at most {N_PHOTOS_MAX} photos, more came");
                    return Err(Problem::new(Kind::Field, detail).at("/images"));
                }
                let image = form.content(photo_bytes_max).await?.ok_or_else(|| {
                    let detail = format!("/images/{n}: a photo may hold at most {photo_bytes_max} bytes");
                    Problem::new(Kind::BodyTooLarge, detail).at(format!("/images/{n}"))
                })?;
                upload.images.push(image);
            }
            ("class_name", Fields::Job) => {
                once(&mut upload.class_name, &mut form, "/class_name", CLASS_NAME_BYTES_MAX).await?;
            }
            ("options", Fields::Job) => {
                once(&mut upload.options, &mut form, "/options", OPTIONS_BYTES_MAX).await?;
            }
            _ => {
                let wanted = if fields == Fields::Job { "images, class_name, options" } else { "images" };
                let detail = format!("unknown part {:?}; wanted {wanted}", super::body::shorten(&name));
                return Err(Problem::new(Kind::Field, detail));
            }
        }
    }
    Ok(upload)
}

async fn once(
    field: &mut Option<Bytes>,
    form: &mut Form,
    pointer: &str,
    bytes_max: usize,
) -> Result<(), Problem> {
    let refused = |how: String| Problem::new(Kind::Field, format!("{pointer}: {how}")).at(pointer);
    if field.is_some() {
        return Err(refused("came twice".into()));
    }
    let content = form.content(bytes_max).await?;
    *field = Some(content.ok_or_else(|| refused(format!("wanted at most {bytes_max} bytes")))?);
    Ok(())
}

/// Decodes the photos and stores them under the job, one at a time: decoded, a photo may take a hundred megabytes. What was
/// stored before one is refused is the caller's to take away.
pub(super) async fn store(
    front: &Front,
    tenant: TenantId,
    id: JobId,
    images: Vec<Bytes>,
) -> Result<Vec<Object>, Problem> {
    let (mut objects, mut inspections) = (Vec::new(), Vec::new());
    for (n, image) in images.into_iter().enumerate() {
        let photo = front.decoder.decode(image).await;
        let photo = photo.map_err(|refusal| Problem::from(refusal).about(format!("/images/{n}")))?;
        objects.push(front.blobs.put(&Key::photo(tenant, id, n), photo.png).await?);
        inspections.push(photo.inspection);
    }
    for (object, remark) in objects.iter_mut().zip(remarks(&inspections)) {
        object.meta = remark;
    }
    Ok(objects)
}

/// What the row keeps of each photo beside its object: its size, and what is odd about it.
fn remarks(inspections: &[Inspection]) -> Vec<Value> {
    let pairs = duplicates(inspections);
    let remark = |(n, seen): (usize, &Inspection)| {
        let mut warnings: Vec<_> = seen.warnings.iter().map(|warning| warning.as_str()).collect();
        if pairs.iter().any(|&(_, later)| later == n) {
            warnings.push("duplicate");
        }
        json!({ "width": seen.width, "height": seen.height, "warnings": warnings })
    };
    inspections.iter().enumerate().map(remark).collect()
}
