//! What all handlers share.

use std::ops::Deref;
use std::sync::Arc;

use metrics_exporter_prometheus::PrometheusHandle;
use tokio_util::sync::CancellationToken;

use super::fair_pool::Shares;
use super::keys::Keys;
use super::operations::Operations;
use super::problem::Problem;
use super::product_detector::Spotter;
use super::queue_position::Positions;
use super::settings::Settings;
use super::upload_queue::Line;
use crate::blobs::Blobs;
use crate::health::Health;
use crate::job::{Job, JobId, Kind, TenantId};
use crate::photo::Decoder;
use crate::store::Store;

/// What all handlers share. Cheap to clone.
#[derive(Clone)]
pub struct Front(Arc<Shared>);

/// What the clones of a [`Front`] share.
pub struct Shared {
    pub(super) store: Store,
    pub(super) blobs: Blobs,
    pub(super) decoder: Decoder,
    pub(super) settings: Settings,
    pub(super) operations: Arc<Operations>,
    pub(super) closing: CancellationToken,
    pub(super) keys: Keys,
    pub(super) shares: Shares,
    pub(super) uploads: Line,
    pub(super) positions: Positions,
    pub(super) spotter: Option<Arc<dyn Spotter>>,
}

impl Deref for Front {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

impl Front {
    /// A front of these. `closing` says that the server ends: it is no longer ready, and streams end. `devices` are those
    /// of the workers in the same process, if there are some. Without a `spotter` photos are inspected without looking for
    /// the product.
    pub fn new(
        store: Store,
        blobs: Blobs,
        decoder: Decoder,
        settings: Settings,
        metrics: PrometheusHandle,
        closing: CancellationToken,
        devices: Health,
        spotter: Option<Arc<dyn Spotter>>,
    ) -> Self {
        let (rows, objects, end) = (store.clone(), blobs.clone(), closing.clone());
        let operations = Operations::of_front(rows, objects, metrics, end, devices);
        Self(Arc::new(Shared {
            operations: Arc::new(operations),
            keys: Keys::new(store.clone(), settings.key_time),
            shares: Shares::new(settings.requests_max, settings.waits_max, settings.streams_max),
            uploads: Line::new(settings.uploads_max, decoder.n_parallel()),
            positions: Positions::new(store.clone()),
            store,
            blobs,
            decoder,
            settings,
            closing,
            spotter,
        }))
    }

    /// The caller's job of that kind.
    pub(super) async fn find_job(&self, tenant: TenantId, id: JobId, kind: Kind) -> Result<Job, Problem> {
        let found = self.store.find(tenant, id, kind).await?;
        found.ok_or_else(|| Problem::not_found(if kind == Kind::Train { "job" } else { "sample" }))
    }
}
