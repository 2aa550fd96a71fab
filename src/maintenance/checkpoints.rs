//! Removal of checkpoints that ended jobs no longer need.

use super::error::{Error, RemovalError};
use crate::blobs::{Blobs, Key};
use crate::job::{Checkpoint, JobId};
use crate::store::Store;

/// Rows read at once.
pub(super) const PAGE: u32 = 100;

/// Removes the checkpoints of ended jobs, at most one page of them. Continues after a failure; returns the first error.
pub async fn remove_obsolete_checkpoints(store: &Store, blobs: &Blobs) -> Result<(), Error> {
    let mut first = None;
    for (job, checkpoint) in store.obsolete_checkpoints(None, PAGE).await? {
        if let Err(error) = remove_checkpoint(store, blobs, job, &checkpoint).await {
            first.get_or_insert(error);
        }
    }
    first.map_or(Ok(()), |error| Err(error.into()))
}

/// Removes a checkpoint: first the object, then its mention in the row.
pub(super) async fn remove_checkpoint(
    store: &Store,
    blobs: &Blobs,
    job: JobId,
    checkpoint: &Checkpoint,
) -> Result<(), RemovalError> {
    if let Some(key) = Key::parse(&checkpoint.object.key) {
        blobs.delete(&key).await?;
    }
    Ok(store.forget_checkpoint(job).await?)
}
