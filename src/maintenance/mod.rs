//! Maintenance services: periodic work that any process of the service may do.
//!
//! The rescuer takes jobs back from dead workers, the eraser removes what was deleted, and the deployment's marker is
//! kept up to date. Any number of processes may run them at once: every statement checks again what it relies on.

mod checkpoints;
mod eraser;
mod error;
mod failure_log;
mod rescuer;

use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio_util::sync::CancellationToken;
use tracing::error;

use crate::blobs::Blobs;
use crate::clock;
use crate::deployment;
use crate::store::Store;
use failure_log::FailureLog;

pub use checkpoints::remove_obsolete_checkpoints;
pub use eraser::{Eraser, erase};
pub use error::Error;
pub use rescuer::rescue;

/// Runs all services every `interval` until `stop`. What a client of this process deletes is erased at once.
pub async fn run(store: Store, blobs: Blobs, interval: Duration, stop: CancellationToken) {
    let rescuing = async {
        let mut log = FailureLog::new("rescuer");
        loop {
            log.record(caught(rescue(&store).boxed()).await.err().map(|error| error.to_string()));
            clock::sleep(interval).await;
        }
    };
    let erasing = async {
        let mut eraser = Eraser::new(store.clone(), blobs.clone());
        let mut log = FailureLog::new("eraser");
        loop {
            log.record(caught(eraser.round().boxed()).await.unwrap_or_else(|error| Some(error.to_string())));
            tokio::select! {
                biased;
                () = store.wait_for_deletion() => {}
                () = clock::sleep(interval) => {}
            }
        }
    };
    let marking = async {
        let mut log = FailureLog::new("deployment_marker");
        loop {
            clock::sleep(interval).await;
            let marking = async { Ok(deployment::mark(&store, &blobs, false).await?) };
            log.record(caught(marking.boxed()).await.err().map(|error| error.to_string()));
        }
    };
    let all = async { tokio::join!(biased; rescuing, erasing, marking) };
    stop.run_until_cancelled(all.boxed()).await;
}

/// Turns a panic into an error, so that the next round still comes.
async fn caught<T>(round: BoxFuture<'_, Result<T, Error>>) -> Result<T, Error> {
    AssertUnwindSafe(round).catch_unwind().await.unwrap_or_else(|_| {
        error!("maintenance panicked");
        Err("it panicked".into())
    })
}
