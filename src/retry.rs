//! A job done again. What has ended never changes, so this is a new job: the same spec, seed included, and copies of the
//! photos, so that each of the two can be deleted without the other.

use crate::blobs::{self, Blobs, Key, Scope};
use crate::job::{Job, JobId, Kind, Object, State};
use crate::store::{self, Idempotency, NewJob, Origin, Store, Submitted};

/// What the job that is done again does not say itself.
#[derive(Clone, Debug)]
pub struct Terms {
    /// Attempts that it may have.
    pub max_attempts: i64,
    /// Most waiting jobs of this kind that the tenant may have, this one among them.
    pub queue_max: u64,
    /// The name of the request, if a client gave it one.
    pub idempotency: Option<Idempotency>,
    /// W3C `traceparent` of the request.
    pub trace: Option<String>,
}

/// What became of the wish.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "it is returned once and taken apart")]
pub enum Retried {
    /// It was asked for, with this answer.
    Submitted(Submitted),
    /// The job is in another state: only one that failed or was canceled is done again.
    WrongState(State),
}

/// Why nothing can be said.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database does not answer. After [`store::Error::Unknown`] the new job may be there or not, and its photos stay for
    /// whoever collects orphans; after any other there is none.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// A photo could not be read or copied; there is no new job.
    #[error(transparent)]
    Blobs(#[from] blobs::Error),
}

/// Queues once more what `of` was to do. Run it to its end: dropped half-way, it leaves photos that no row names.
pub async fn retry(store: &Store, blobs: &Blobs, of: &Job, terms: Terms) -> Result<Retried, Error> {
    if let Some(idempotency) = &terms.idempotency
        && let Some(before) = store.replay(of.tenant, idempotency).await?
    {
        return Ok(Retried::Submitted(before));
    }
    if !matches!(of.state, State::Failed | State::Canceled) {
        return Ok(Retried::WrongState(of.state));
    }
    let spec = of.spec().map_err(|_| store::Error::Corrupt("column spec is not what it should be".into()))?;
    let id = JobId::new();
    let Some(tenant_made_ms) = store.tenant_made_ms(of.tenant).await? else {
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
        origin: Origin { retry_of: Some(of.id), trace: terms.trace, tenant_made_ms: Some(tenant_made_ms) },
    };
    let submitted = store.submit(new).await;
    // Only where the outcome is not known the row may be there in spite of an error: then it needs its photos.
    if !matches!(&submitted, Ok(Submitted::New(_)) | Err(store::Error::Unknown(_))) {
        discard(blobs, of, id).await;
    }
    Ok(Retried::Submitted(submitted?))
}

/// The photos of `of` under the new job's keys, verified on their way.
async fn copy_photos(blobs: &Blobs, of: &Job, id: JobId) -> Result<Vec<Object>, blobs::Error> {
    let mut photos = Vec::new();
    for (n, photo) in of.photos.iter().enumerate() {
        let bytes = blobs.get(photo).await?;
        let copy = blobs.put(&Key::photo(of.tenant, id, n), bytes).await?;
        photos.push(Object { meta: photo.meta.clone(), ..copy });
    }
    Ok(photos)
}

/// Takes the copies away again: it is certain that no row names them.
async fn discard(blobs: &Blobs, of: &Job, id: JobId) {
    if of.kind == Kind::Train
        && let Err(error) = blobs.delete_all(&Scope::job(of.tenant, id)).await
    {
        tracing::warn!(job.id = %id, %error, "copied photos of a job that is not there stay behind");
    }
}
