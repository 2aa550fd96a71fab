//! Removes local files that nothing needs any more.

use std::time::Duration;

use tracing::warn;

use super::context::Worker;
use super::scratch;
use crate::clock;

/// How often the disk is looked through.
const INTERVAL: Duration = Duration::from_secs(10);

impl Worker {
    /// Removes cached weights of deleted products, and what dead processes left behind, until it is dropped.
    pub(super) async fn clean_up_disk(self) {
        let mut failing = false;
        loop {
            match self.clean_up_disk_once().await {
                Ok(()) => failing = false,
                Err(error) if !failing => {
                    failing = true; // logged once, until it succeeds again
                    warn!(%error, "disk cleanup failed");
                }
                Err(_) => {}
            }
            clock::sleep(INTERVAL).await;
        }
    }

    async fn clean_up_disk_once(&self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        self.weights.remove_deleted(&self.store).await?;
        Ok(scratch::remove_abandoned(&self.settings.scratch)?)
    }
}
