//! Uploads of photos: receives a multipart form, then decodes and stores its photos.

use axum::body::{Body, Bytes};
use axum::http::HeaderMap;
use serde_json::{Value, json};

use super::auth::Caller;
use super::body::{LimitedBody, content_length};
use super::idempotency::{RequestHash, idempotency_key};
use super::json::{from_json, invalid_json, whole_numbers};
use super::multipart::FormReader;
use super::problem::{Kind, Problem, excerpt};
use super::spool::{Spool, Spooled};
use super::state::AppState;
use super::upload_queue::{AdmittedUpload, ProcessingSlot};
use crate::blobs::Key;
use crate::job::{JobId, N_PHOTOS_MAX, N_PHOTOS_MIN, Object, TenantId, TrainOptions, class_name};
use crate::memory::giving_back;
use crate::photo::{Inspection, Photo, Refusal, duplicates};
use crate::store::Idempotency;

/// Size limit of the rest of the form: fields, boundaries, headers.
const REST_BYTES_MAX: usize = 1 << 20;
const CLASS_NAME_BYTES_MAX: usize = 256;
const MODEL_BYTES_MAX: usize = 256;
const OPTIONS_BYTES_MAX: usize = 16 * 1024;

/// The parts of a form as they were received.
#[derive(Debug, Default)]
pub(super) struct Upload {
    pub(super) images: Vec<Spooled>,
    pub(super) class_name: Option<Bytes>,
    pub(super) model: Option<Bytes>,
    pub(super) options: Option<Bytes>,
}

/// Which parts a form may have besides its images.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum FormKind {
    /// `class_name` and `model`.
    Photos,
    /// `class_name`, `model` and `options`.
    Job,
}

impl FormKind {
    fn parts(self) -> &'static str {
        match self {
            Self::Photos => "images, class_name, model",
            Self::Job => "images, class_name, model, options",
        }
    }
}

/// What a form asks to be trained.
pub(super) struct TrainRequest {
    pub(super) class_name: String,
    pub(super) model: Option<String>,
    /// The options that were given: a JSON object of the right shape, its values in their ranges.
    pub(super) options: Value,
}

/// Waits until an upload is admitted, and receives its form. A request that is not a form, or that is not admitted, is
/// refused before anything of its body is read.
pub(super) async fn receive(
    app: &AppState,
    caller: &mut Caller,
    headers: &HeaderMap,
    body: Body,
    fields: FormKind,
) -> Result<(Upload, AdmittedUpload), Problem> {
    caller.release_permit();
    let bytes_max = N_PHOTOS_MAX * app.settings.photo_bytes_max + REST_BYTES_MAX;
    let mut form =
        FormReader::new(headers, LimitedBody::new(headers, body, bytes_max, app.settings.upload_time)?)?;
    let admitted =
        app.uploads.admit(caller.tenant, content_length(headers).unwrap_or(bytes_max as u64)).await?;
    form.report_to(admitted.activity());
    let upload = tokio::select! {
        biased;
        upload = read(app, form, fields) => upload?,
        problem = admitted.revoked() => return Err(problem),
    };
    Ok((upload, admitted))
}

/// Reads the form. Stops at the first invalid part.
async fn read(app: &AppState, mut form: FormReader, fields: FormKind) -> Result<Upload, Problem> {
    let photo_bytes_max = app.settings.photo_bytes_max;
    let mut upload = Upload::default();
    while let Some(name) = form.next_part().await? {
        match (name.as_str(), fields) {
            ("images", _) => {
                let n = upload.images.len();
                if n == N_PHOTOS_MAX {
                    let detail = format!("/images: wanted at most {N_PHOTOS_MAX} photos, got more");
                    return Err(Problem::new(Kind::Field, detail).at("/images"));
                }
                let mut spool = Spool::new(&app.settings.spool);
                if !form.spool_part(photo_bytes_max, &mut spool).await? {
                    let detail = format!("/images/{n}: a photo may have at most {photo_bytes_max} bytes");
                    return Err(Problem::new(Kind::BodyTooLarge, detail).at(format!("/images/{n}")));
                }
                upload.images.push(spool.finish().await?);
            }
            ("class_name", _) => {
                read_once(&mut upload.class_name, &mut form, "/class_name", CLASS_NAME_BYTES_MAX).await?;
            }
            ("model", _) => read_once(&mut upload.model, &mut form, "/model", MODEL_BYTES_MAX).await?,
            ("options", FormKind::Job) => {
                read_once(&mut upload.options, &mut form, "/options", OPTIONS_BYTES_MAX).await?;
            }
            _ => {
                let detail = format!("unknown part {:?}; wanted {}", excerpt(&name), fields.parts());
                return Err(Problem::new(Kind::Field, detail));
            }
        }
    }
    Ok(upload)
}

async fn read_once(
    field: &mut Option<Bytes>,
    form: &mut FormReader,
    pointer: &str,
    bytes_max: usize,
) -> Result<(), Problem> {
    let invalid = |how: String| Problem::new(Kind::Field, format!("{pointer}: {how}")).at(pointer);
    if field.is_some() {
        return Err(invalid("was sent twice".into()));
    }
    let content = form.read_part(bytes_max).await?;
    *field = Some(content.ok_or_else(|| invalid(format!("wanted at most {bytes_max} bytes")))?);
    Ok(())
}

impl Upload {
    /// Bytes of all photos.
    pub(super) fn bytes(&self) -> u64 {
        self.images.iter().map(Spooled::len).sum()
    }

    /// The request's `Idempotency-Key` with a hash of the form, its parts in a fixed order.
    pub(super) async fn idempotency(&self, headers: &HeaderMap) -> Result<Option<Idempotency>, Problem> {
        let Some(key) = idempotency_key(headers)? else { return Ok(None) };
        let mut request = RequestHash::default();
        for field in [&self.class_name, &self.options] {
            request.add(field.as_deref().unwrap_or_default());
        }
        // Only if it is there: the hash of a request without it is that of earlier builds.
        if let Some(model) = &self.model {
            request.add(b"model");
            request.add(model);
        }
        for image in &self.images {
            request = image.hash_into(request).await?;
        }
        Ok(Some(request.with_key(key)))
    }

    /// What is asked to be trained, checked as far as that can be without a model.
    pub(super) fn request(&self) -> Result<TrainRequest, Problem> {
        let n = self.images.len();
        if n < N_PHOTOS_MIN {
            let how = format!("wanted {N_PHOTOS_MIN} to {N_PHOTOS_MAX} photos, got {n}");
            return Err(invalid("/images", how));
        }
        let class_name = self.class_name()?.ok_or_else(|| invalid("/class_name", "is missing".into()))?;
        let options = match &self.options {
            Some(json) => parse_options(json, "/options")?,
            None => json!({}),
        };
        Ok(TrainRequest { class_name, model: self.model()?, options })
    }

    /// The normalized class name, if it was sent.
    pub(super) fn class_name(&self) -> Result<Option<String>, Problem> {
        let text = utf8("/class_name", self.class_name.as_deref())?;
        Ok(text.map(class_name).transpose()?)
    }

    /// The name of the model, if it was sent; an empty one counts as none.
    pub(super) fn model(&self) -> Result<Option<String>, Problem> {
        let text = utf8("/model", self.model.as_deref())?.map(str::trim);
        Ok(text.filter(|text| !text.is_empty()).map(ToOwned::to_owned))
    }
}

fn invalid(pointer: &str, how: String) -> Problem {
    Problem::new(Kind::Field, format!("{pointer}: {how}")).at(pointer)
}

fn utf8<'a>(pointer: &str, bytes: Option<&'a [u8]>) -> Result<Option<&'a str>, Problem> {
    let text = bytes.map(std::str::from_utf8).transpose();
    text.map_err(|_| invalid(pointer, "is not UTF-8".into()))
}

/// Parses the training options of the document at `pointer`: those that it names.
fn parse_options(bytes: &[u8], pointer: &str) -> Result<Value, Problem> {
    from_json::<TrainOptions>(bytes, pointer)?; // for its errors, which name the field
    let given = serde_json::from_slice(&whole_numbers(bytes));
    given.map_err(|error| invalid_json(&error, pointer))
}

/// Decodes a photo; only the decoded picture stays in memory.
pub(super) async fn decode(app: &AppState, image: &Spooled) -> Result<Result<Photo, Refusal>, Problem> {
    Ok(app.decoder.decode(image.read().await?).await)
}

/// Decodes the photos and stores them under the job, one at a time: decoded, a photo may take a hundred megabytes. If
/// one is refused, the caller has to delete those stored before.
pub(super) async fn store_photos(
    app: &AppState,
    tenant: TenantId,
    id: JobId,
    images: Vec<Spooled>,
    slot: &mut ProcessingSlot,
) -> Result<Vec<Object>, Problem> {
    let (mut objects, mut inspections) = (Vec::new(), Vec::new());
    for (n, image) in images.into_iter().enumerate() {
        let photo = decode(app, &image).await?;
        let photo =
            photo.map_err(|refusal| Problem::from(refusal).prefixed_with_pointer(format!("/images/{n}")))?;
        let png = Bytes::from(photo.png);
        let stored = app.blobs.put(&Key::photo(tenant, id, n), png.clone()).await;
        giving_back(|| drop(png));
        objects.push(stored?);
        inspections.push(photo.inspection);
        slot.photo_done(image.len());
    }
    for (object, meta) in objects.iter_mut().zip(photo_meta(&inspections)) {
        object.meta = meta;
    }
    Ok(objects)
}

/// Metadata of each photo for the job's row: size and warnings.
fn photo_meta(inspections: &[Inspection]) -> Vec<Value> {
    let pairs = duplicates(inspections);
    let meta = |(n, seen): (usize, &Inspection)| {
        let mut warnings: Vec<_> = seen.warnings.iter().map(|warning| warning.as_str()).collect();
        if pairs.iter().any(|&(_, later)| later == n) {
            warnings.push("duplicate");
        }
        json!({ "width": seen.width, "height": seen.height, "warnings": warnings })
    };
    inspections.iter().enumerate().map(meta).collect()
}
