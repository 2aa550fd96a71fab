//! Retries of ended jobs. An ended job never changes, so a retry is a new job with the same specification, seed
//! included, and copies of the photos: either of the two can be deleted without the other.

use crate::blobs::{self, Blobs, Key, Scope};
use crate::job::{Job, JobId, Kind, Object, State};
use crate::store::{self, Idempotency, NewJob, Origin, Store, Submitted};

/// Parameters of a retry that the old job does not hold.
#[derive(Clone, Debug)]
pub struct Terms {
    /// Maximum number of attempts.
    pub max_attempts: i64,
    /// Maximum number of waiting jobs of this kind for the tenant, this one included.
    pub queue_max: u64,
    /// The request's idempotency key, if any.
    pub idempotency: Option<Idempotency>,
    /// W3C `traceparent` of the request.
    pub trace: Option<String>,
}

/// The outcome of a retry.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "it is returned once and destructured")]
pub enum Retried {
    /// The new job was submitted, with this outcome.
    Submitted(Submitted),
    /// The job is in another state: only failed and canceled jobs are retried.
    WrongState(State),
}

/// Why a retry failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database failed. After [`store::Error::Unknown`] the new job may or may not exist, and its photos stay for
    /// `hypnos sweep`; after any other error it does not exist.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// A photo could not be read or copied; there is no new job.
    #[error(transparent)]
    Blobs(#[from] blobs::Error),
}

/// Retries the job `of`. Run it to its end: dropped before, it leaves photos that no row names.
pub async fn retry(store: &Store, blobs: &Blobs, of: &Job, terms: Terms) -> Result<Retried, Error> {
    if let Some(idempotency) = &terms.idempotency
        && let Some(before) = store.replay(of.tenant, idempotency).await?
    {
        return Ok(Retried::Submitted(before));
    }
    if !matches!(of.state, State::Failed | State::Canceled) {
        return Ok(Retried::WrongState(of.state));
    }
    let spec =
        of.spec().map_err(|_| store::Error::Corrupt("column spec holds no valid JSON document".into()))?;
    let id = JobId::new();
    let Some(tenant_created_ms) = store.tenant_created_ms(of.tenant).await? else {
        return Ok(Retried::Submitted(Submitted::Disabled));
    };
    let photos = match copy_photos(blobs, of, id).await {
        Ok(photos) => photos,
        Err(error) => {
            discard(blobs, of, id).await;
            return Err(error.into());
        }
    };
    let new = NewJob {
        id,
        tenant: of.tenant,
        parent: of.parent,
        priority: spec.priority(),
        spec,
        photos,
        max_attempts: terms.max_attempts,
        idempotency: terms.idempotency,
        queue_max: terms.queue_max,
        origin: Origin {
            retry_of: Some(of.id),
            trace: terms.trace,
            tenant_created_ms: Some(tenant_created_ms),
        },
    };
    let submitted = store.submit(new).await;
    // If the outcome is unknown, the row may exist in spite of the error, and needs its photos.
    if !matches!(&submitted, Ok(Submitted::New(_)) | Err(store::Error::Unknown(_))) {
        discard(blobs, of, id).await;
    }
    Ok(Retried::Submitted(submitted?))
}

/// Copies the photos of `of` to the new job's keys, verified.
async fn copy_photos(blobs: &Blobs, of: &Job, id: JobId) -> Result<Vec<Object>, blobs::Error> {
    let mut photos = Vec::new();
    for (n, photo) in of.photos.iter().enumerate() {
        let bytes = blobs.get(photo).await?;
        let copy = blobs.put(&Key::photo(of.tenant, id, n), bytes).await?;
        photos.push(Object { meta: photo.meta.clone(), ..copy });
    }
    Ok(photos)
}

/// Removes the copies: it is certain that no row names them.
async fn discard(blobs: &Blobs, of: &Job, id: JobId) {
    if of.kind == Kind::Train
        && let Err(error) = blobs.delete_all(&Scope::job(of.tenant, id)).await
    {
        tracing::warn!(job.id = %id, %error, "copied photos of a job that was not accepted not removed");
    }
}
