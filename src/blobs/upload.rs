//! Multipart uploads that remove their parts if they do not complete.

use std::time::Duration;

use bytes::Bytes;
use object_store::MultipartUpload;

use super::error::Error;
use crate::clock;

/// How long aborting a dropped upload may take.
const ABORT_TIMEOUT: Duration = Duration::from_secs(45);

/// A multipart upload. Dropped before it completes, it is aborted.
pub(super) struct Upload(pub(super) Option<Box<dyn MultipartUpload>>);

impl Upload {
    pub(super) fn part(&mut self, bytes: Bytes) -> object_store::UploadPart {
        match &mut self.0 {
            Some(upload) => upload.put_part(bytes.into()),
            None => unreachable!("an upload is sent before it is completed"),
        }
    }

    pub(super) async fn complete(&mut self) -> object_store::Result<()> {
        if let Some(upload) = &mut self.0 {
            upload.complete().await?;
        }
        self.0 = None;
        Ok(())
    }

    pub(super) async fn abort(&mut self, timeout: Duration) {
        if let Some(mut upload) = self.0.take() {
            abort(&mut *upload, timeout).await;
        }
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if let Some(mut upload) = self.0.take()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(async move { abort(&mut *upload, ABORT_TIMEOUT).await });
        }
    }
}

async fn abort(upload: &mut dyn MultipartUpload, timeout: Duration) {
    match clock::timeout(timeout, upload.abort()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(error = %Error::from(error), "upload not aborted"),
        Err(_elapsed) => tracing::warn!("upload not aborted in time"),
    }
}
