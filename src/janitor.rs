//! What must happen sooner or later, whoever is up: jobs of dead workers go back to the queue, deleted jobs lose their
//! objects. Any number of processes may do it at once; every statement checks again what it relies on.

use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::blobs::{Blobs, Key, Scope};
use crate::job::{JobId, TenantId};
use crate::store::{Rescued, Store};

/// Jobs looked after in one round.
const ROUND_MAX: u32 = 100;

/// What kept something from being tidied.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// Tidies every `pause` until `stop`.
pub async fn run(store: Store, blobs: Blobs, pause: Duration, stop: CancellationToken) {
    let mut away = false;
    loop {
        match round(&store, &blobs).await {
            Ok(()) => away = false,
            Err(error) if !away => {
                away = true; // said once, until it is back
                warn!("nothing can be tidied: {error}");
            }
            Err(_) => {}
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

async fn round(store: &Store, blobs: &Blobs) -> Result<(), Error> {
    let Rescued { requeued, failed, canceled } = store.rescue().await?;
    if requeued + failed + canceled > 0 {
        info!(requeued, failed, canceled, "jobs whose worker was not heard of");
        metrics::counter!("hypnos_rescued_total").increment(requeued + failed + canceled);
    }
    remove_spent_checkpoints(store, blobs).await?;
    for (tenant, job) in store.erasable(ROUND_MAX).await? {
        erase(store, blobs, tenant, job).await?;
    }
    Ok(())
}

/// Removes the checkpoints of jobs that have ended.
pub async fn remove_spent_checkpoints(store: &Store, blobs: &Blobs) -> Result<(), Error> {
    for (job, checkpoint) in store.spent_checkpoints(ROUND_MAX).await? {
        if let Some(key) = Key::parse(&checkpoint.object.key) {
            blobs.delete(&key).await?;
        }
        store.forget_checkpoint(job).await?;
    }
    Ok(())
}

/// Erases a deleted job: its objects, then its row. Fails without harm: the row still says that it is to be erased.
pub async fn erase(store: &Store, blobs: &Blobs, tenant: TenantId, job: JobId) -> Result<(), Error> {
    blobs.delete_all(&Scope::job(tenant, job)).await?;
    Ok(store.erased(job).await?)
}
