//! The state that all handlers share.

use std::ops::Deref;
use std::sync::Arc;

use metrics_exporter_prometheus::PrometheusHandle;
use tokio_util::sync::CancellationToken;

use super::fair_pool::FairPools;
use super::keys::KeyCache;
use super::operations::Operations;
use super::problem::Problem;
use super::product_detector::ProductDetector;
use super::queue_position::QueuePositions;
use super::settings::Settings;
use super::upload_queue::UploadQueue;
use super::vocabularies::Vocabularies;
use crate::blobs::Blobs;
use crate::health::Health;
use crate::job::{Job, JobId, Kind, TenantId};
use crate::photo::Decoder;
use crate::store::Store;

/// The state that all handlers share. Cheap to clone.
#[derive(Clone)]
pub struct AppState(Arc<Inner>);

/// The contents of an [`AppState`].
pub struct Inner {
    pub(super) store: Store,
    pub(super) blobs: Blobs,
    pub(super) decoder: Decoder,
    pub(super) settings: Settings,
    pub(super) operations: Arc<Operations>,
    pub(super) closing: CancellationToken,
    pub(super) keys: KeyCache,
    pub(super) pools: FairPools,
    pub(super) uploads: UploadQueue,
    pub(super) positions: QueuePositions,
    pub(super) vocabularies: Vocabularies,
    pub(super) detector: Option<Arc<dyn ProductDetector>>,
}

impl Deref for AppState {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.0
    }
}

impl AppState {
    /// The state of a server. Once `closing` is canceled it is no longer ready, and streams end. `devices` are those of
    /// the workers in the same process, if there are any. Without a `detector`, inspected photos have no `product`.
    pub fn new(
        store: Store,
        blobs: Blobs,
        decoder: Decoder,
        settings: Settings,
        metrics: PrometheusHandle,
        closing: CancellationToken,
        devices: Health,
        detector: Option<Arc<dyn ProductDetector>>,
    ) -> Self {
        let (rows, objects, end) = (store.clone(), blobs.clone(), closing.clone());
        let operations = Operations::for_server(rows, objects, metrics, end, devices);
        Self(Arc::new(Inner {
            operations: Arc::new(operations),
            keys: KeyCache::new(store.clone(), settings.key_time),
            pools: FairPools::new(settings.requests_max, settings.waits_max, settings.streams_max),
            uploads: UploadQueue::new(settings.uploads_max, decoder.n_parallel()),
            positions: QueuePositions::new(store.clone()),
            vocabularies: Vocabularies::new(),
            store,
            blobs,
            decoder,
            settings,
            closing,
            detector,
        }))
    }

    /// The tenant's job of that kind.
    pub(super) async fn find_job(&self, tenant: TenantId, id: JobId, kind: Kind) -> Result<Job, Problem> {
        let found = self.store.find(tenant, id, kind).await?;
        found.ok_or_else(|| Problem::not_found(if kind == Kind::Train { "job" } else { "sample" }))
    }
}
