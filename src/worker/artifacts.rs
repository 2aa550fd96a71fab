//! Objects of an attempt: reads, writes and the training's checkpoint.

use std::path::Path;

use serde_json::{Value, json};
use tracing::warn;

use super::context::Worker;
use super::lease::LeaseHandle;
use super::outcome::Outcome;
use super::retry::{Refused, retry_while_leased};
use crate::blobs::{Key, Name};
use crate::engine::Image;
use crate::job::{Checkpoint, Job, Object};
use crate::store;

/// Where the bytes of an object come from.
pub(super) enum Content<'a> {
    Bytes(bytes::Bytes),
    File(&'a Path),
}

impl Worker {
    /// Stores an artifact of this attempt, with its metadata.
    pub(super) async fn put(
        &self,
        job: &Job,
        lease: &LeaseHandle,
        name: Name,
        content: Content<'_>,
        meta: Value,
    ) -> Result<Object, Outcome> {
        let key = Key::artifact(job.tenant, job.lease(), name);
        let stored = retry_while_leased(lease, async || match &content {
            Content::Bytes(bytes) => self.blobs.put(&key, bytes.clone()).await,
            Content::File(file) => self.blobs.put_file(&key, file, |_| {}).await,
        });
        Ok(Object { meta, ..stored.await? })
    }

    /// Stores an image, with the parameters that reproduce it.
    pub(super) async fn put_image(
        &self,
        job: &Job,
        lease: &LeaseHandle,
        name: Name,
        image: &Image,
    ) -> Result<Object, Outcome> {
        let meta = json!({
            "prompt": image.prompt, "seed": image.seed,
            "width": image.width, "height": image.height,
        });
        self.put(job, lease, name, Content::Bytes(image.bytes.clone().into()), meta).await
    }

    /// Fetches an object that a row names.
    pub(super) async fn get(&self, lease: &LeaseHandle, object: &Object) -> Result<bytes::Bytes, Outcome> {
        Ok(retry_while_leased(lease, || self.blobs.get(object)).await?)
    }

    /// A statement under the job's lease, retried for as long as the lease is held. One whose outcome is unknown is
    /// sent again: the row shows whether it was done.
    pub(super) async fn write<T, F: Future<Output = store::Result<T>>>(
        &self,
        lease: &LeaseHandle,
        write: impl Fn() -> F,
    ) -> Result<T, Refused<store::Error>> {
        retry_while_leased(lease, write).await
    }

    /// Makes `checkpoint` the one to resume from, and removes the previous one.
    pub(super) async fn commit_checkpoint(
        &self,
        lease: &LeaseHandle,
        checkpoint: &Checkpoint,
    ) -> Result<(), Refused<store::Error>> {
        let previous = self.write(lease, || self.store.commit_checkpoint(lease.lease, checkpoint)).await?;
        if let Some(key) = previous.and_then(|previous| Key::parse(&previous.object.key))
            && let Err(error) = self.blobs.delete(&key).await
        {
            warn!(%error, "previous checkpoint not removed");
        }
        Ok(())
    }
}
