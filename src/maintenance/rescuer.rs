//! The rescuer: takes jobs back from workers whose leases expired.

use tracing::info;

use super::error::Error;
use crate::store::{Rescued, Store};

/// Takes jobs back from workers that did not renew their lease or exceeded the deadline.
pub async fn rescue(store: &Store) -> Result<(), Error> {
    let Rescued { requeued, failed, canceled } = store.rescue().await?;
    if requeued + failed + canceled > 0 {
        info!(requeued, failed, canceled, "rescued expired leases");
        metrics::counter!("hypnos_rescued_total").increment(requeued + failed + canceled);
    }
    Ok(())
}
