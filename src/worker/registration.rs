//! Keeps the model that a device holds registered in the database while its worker runs.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::task::AbortOnDropHandle;
use tracing::warn;
use uuid::Uuid;

use crate::clock;
use crate::job::HeldModel;
use crate::store::{self, Store};

/// Part of the registration's time after which it is renewed.
const RENEW_AFTER: u32 = 4;

/// A registration; when dropped without [`Registration::end`] it runs out.
pub(super) struct Registration {
    store: Store,
    worker: Uuid,
    keeper: AbortOnDropHandle<()>,
}

impl Registration {
    /// Registers the model, for `time` at once and again and again, in a task of its own. A database that is
    /// unavailable delays the registration and nothing else.
    pub(super) fn start(
        store: Store,
        worker: Uuid,
        device: &str,
        model: Arc<HeldModel>,
        time: Duration,
    ) -> Self {
        let keep = keep(store.clone(), worker, device.to_owned(), model, time);
        Self { store, worker, keeper: AbortOnDropHandle::new(tokio::spawn(keep)) }
    }

    /// Ends the registration, so that no job waits for a worker that is gone.
    pub(super) async fn end(self) {
        self.keeper.abort();
        if let Err(error) = self.store.unregister_model(self.worker).await {
            warn!(%error, "model not unregistered; its registration will expire");
        }
    }
}

async fn keep(store: Store, worker: Uuid, device: String, model: Arc<HeldModel>, time: Duration) {
    let mut failing = false;
    loop {
        let registered = renew_or_register(&store, worker, &device, &model, time).await;
        match &registered {
            Err(error) if !failing => warn!(%error, "model not registered; retrying"),
            _ => {}
        }
        failing = registered.is_err();
        clock::sleep(time / RENEW_AFTER).await;
    }
}

async fn renew_or_register(
    store: &Store,
    worker: Uuid,
    device: &str,
    model: &HeldModel,
    time: Duration,
) -> store::Result<()> {
    if store.renew_model(worker, time).await? {
        return Ok(());
    }
    store.register_model(worker, device, model, time).await
}
