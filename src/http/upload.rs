//! A form of photos: read whole or refused, then decoded and stored.

use axum::body::{Body, Bytes};
use axum::http::HeaderMap;
use serde_json::{Value, json};

use super::auth::Caller;
use super::body::{Inflow, announced};
use super::idempotency::{RequestHash, idempotency_key};
use super::json::{from_json, misfit, whole_numbers};
use super::multipart::Form;
use super::problem::{Kind, Problem, shorten};
use super::spool::{Spool, Spooled};
use super::state::Front;
use super::submit::drawn_seed;
use super::upload_queue::{Admitted, Turn};
use crate::blobs::Key;
use crate::job::{Invalid, JobId, N_PHOTOS_MAX, N_PHOTOS_MIN, Object, TenantId, TrainOptions, TrainSpec};
use crate::memory::giving_back;
use crate::photo::{Inspection, Photo, Refusal, duplicates};
use crate::store::Idempotency;

/// Beside the photos: fields, boundaries, heads.
const REST_BYTES_MAX: usize = 1 << 20;
const CLASS_NAME_BYTES_MAX: usize = 256;
const OPTIONS_BYTES_MAX: usize = 16 * 1024;

/// The form's parts as they came.
#[derive(Debug, Default)]
pub(super) struct Upload {
    pub(super) images: Vec<Spooled>,
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

/// Lets an upload in and reads its form. What cannot be one is refused before, and so is what is too much for now: then
/// nothing of it is read.
pub(super) async fn receive(
    front: &Front,
    caller: &mut Caller,
    headers: &HeaderMap,
    body: Body,
    fields: Fields,
) -> Result<(Upload, Admitted), Problem> {
    caller.step_aside();
    let bytes_max = N_PHOTOS_MAX * front.settings.photo_bytes_max + REST_BYTES_MAX;
    let mut form = Form::new(headers, Inflow::new(headers, body, bytes_max, front.settings.upload_time)?)?;
    let admitted = front.uploads.admit(caller.tenant, announced(headers).unwrap_or(bytes_max as u64)).await?;
    form.signs(admitted.life());
    let upload = tokio::select! {
        biased;
        upload = read(front, form, fields) => upload?,
        problem = admitted.asked_back() => return Err(problem),
    };
    Ok((upload, admitted))
}

/// Reads the form. Stops at the first part that cannot be.
async fn read(front: &Front, mut form: Form, fields: Fields) -> Result<Upload, Problem> {
    let photo_bytes_max = front.settings.photo_bytes_max;
    let mut upload = Upload::default();
    while let Some(name) = form.next().await? {
        match (name.as_str(), fields) {
            ("images", _) => {
                let n = upload.images.len();
                if n == N_PHOTOS_MAX {
                    let detail = format!("/images: wanted at most {N_PHOTOS_MAX} photos, more came");
                    return Err(Problem::new(Kind::Field, detail).at("/images"));
                }
                let mut spool = Spool::new(&front.settings.spool);
                if !form.spool(photo_bytes_max, &mut spool).await? {
                    let detail = format!("/images/{n}: a photo may hold at most {photo_bytes_max} bytes");
                    return Err(Problem::new(Kind::BodyTooLarge, detail).at(format!("/images/{n}")));
                }
                upload.images.push(spool.end().await?);
            }
            ("class_name", Fields::Job) => {
                once(&mut upload.class_name, &mut form, "/class_name", CLASS_NAME_BYTES_MAX).await?;
            }
            ("options", Fields::Job) => {
                once(&mut upload.options, &mut form, "/options", OPTIONS_BYTES_MAX).await?;
            }
            _ => {
                let wanted = if fields == Fields::Job { "images, class_name, options" } else { "images" };
                let detail = format!("unknown part {:?}; wanted {wanted}", shorten(&name));
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

impl Upload {
    /// Bytes of all photos.
    pub(super) fn bytes(&self) -> u64 {
        self.images.iter().map(Spooled::len).sum()
    }

    /// The request's own name, with a hash of all that is asked for, in a fixed order.
    pub(super) async fn idempotency(&self, headers: &HeaderMap) -> Result<Option<Idempotency>, Problem> {
        let Some(key) = idempotency_key(headers)? else { return Ok(None) };
        let mut request = RequestHash::default();
        for field in [&self.class_name, &self.options] {
            request.add(field.as_deref().unwrap_or_default());
        }
        for image in &self.images {
            request = image.hashed(request).await?;
        }
        Ok(Some(request.named(key)))
    }

    pub(super) fn spec(&self) -> Result<TrainSpec, Problem> {
        let refused =
            |pointer: &str, how: String| Problem::new(Kind::Field, format!("{pointer}: {how}")).at(pointer);
        let n = self.images.len();
        if n < N_PHOTOS_MIN {
            let how = format!("wanted {N_PHOTOS_MIN} to {N_PHOTOS_MAX} photos, got {n}");
            return Err(refused("/images", how));
        }
        let class_name =
            self.class_name.as_deref().ok_or_else(|| refused("/class_name", "is missing".into()))?;
        let class_name = std::str::from_utf8(class_name);
        let class_name = class_name.map_err(|_| refused("/class_name", "is not UTF-8".into()))?;
        let options: TrainOptions = match &self.options {
            Some(json) => options(json, "/options")?,
            None => TrainOptions::default(),
        };
        options.check().map_err(|invalid| {
            let pointer = format!("/options{}", invalid.pointer);
            Invalid { pointer, ..invalid }
        })?;
        Ok(TrainSpec::new(class_name, options, drawn_seed()?)?)
    }
}

/// A training's options: what the document at `pointer` says, and for the rest the defaults of its method.
fn options(bytes: &[u8], pointer: &str) -> Result<TrainOptions, Problem> {
    from_json::<TrainOptions>(bytes, pointer)?; // says where it is wrong
    let some = serde_json::from_slice(&whole_numbers(bytes)).and_then(|some| TrainOptions::given(&some));
    some.map_err(|error| misfit(&error, pointer))
}

/// Decodes a photo; none of it stays in memory but the picture.
pub(super) async fn decode(front: &Front, image: &Spooled) -> Result<Result<Photo, Refusal>, Problem> {
    Ok(front.decoder.decode(image.read().await?).await)
}

/// Decodes the photos and stores them under the job, one at a time: decoded, a photo may take a hundred megabytes. What was
/// stored before one is refused is the caller's to take away.
pub(super) async fn store(
    front: &Front,
    tenant: TenantId,
    id: JobId,
    images: Vec<Spooled>,
    turn: &mut Turn,
) -> Result<Vec<Object>, Problem> {
    let (mut objects, mut inspections) = (Vec::new(), Vec::new());
    for (n, image) in images.into_iter().enumerate() {
        let photo = decode(front, &image).await?;
        let photo = photo.map_err(|refusal| Problem::from(refusal).about(format!("/images/{n}")))?;
        let png = Bytes::from(photo.png);
        let stored = front.blobs.put(&Key::photo(tenant, id, n), png.clone()).await;
        giving_back(|| drop(png));
        objects.push(stored?);
        inspections.push(photo.inspection);
        turn.done(image.len());
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
