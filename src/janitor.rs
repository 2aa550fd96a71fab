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

/// One round of all of it.
pub async fn round(store: &Store, blobs: &Blobs) -> Result<(), Error> {
    let Rescued { requeued, failed, canceled } = store.rescue().await?;
    if requeued + failed + canceled > 0 {
        info!(requeued, failed, canceled, "jobs whose worker was not heard of");
        metrics::counter!("hypnos_rescued_total").increment(requeued + failed + canceled);
    }
    remove_spent_checkpoints(store, blobs).await?;
    let tenants = store.deleting_tenants().await?;
    for &tenant in &tenants {
        store.delete_jobs_of(tenant, ROUND_MAX).await?;
    }
    for (tenant, job) in store.erasable(ROUND_MAX).await? {
        erase(store, blobs, tenant, job).await?;
    }
    for tenant in tenants {
        finish_tenant(store, blobs, tenant).await?;
    }
    Ok(())
}

/// Erases what is left of a deleted tenant when its last job is gone: class images, whatever no row names, its rows.
async fn finish_tenant(store: &Store, blobs: &Blobs, tenant: TenantId) -> Result<(), Error> {
    if store.holdings(tenant).await?.jobs > 0 {
        return Ok(());
    }
    blobs.delete_all(&Scope::tenant(tenant)).await?;
    if store.forget_tenant(tenant).await? {
        info!(%tenant, "a deleted tenant is erased");
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
