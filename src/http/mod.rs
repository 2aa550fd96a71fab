//! Requests to rows.
//!
//! Every handler is a short story: who asks, what for, the row, the answer. The work is a worker's, and the two meet in
//! the table. Nothing that a client says of itself or of us is believed: `Host`, `X-Forwarded-*`, types and names of files.
//!
//! ```text
//! serve     connections                  edge      what every request passes      keys      who asks
//! shares    places for what is at once   line      uploads, one after the other   spool     bytes until they are worked on
//! body      bytes in, within bounds      form      parts of a form                upload    forms to photos to objects
//! jobs samples photos files health       events    a job as it changes            submit    the door of the queue
//! reading   ids, pages, waiting          view      what a client sees of a row    problem   errors to statuses, once
//! position  a place in the queue, followed
//! document  the handlers, described      page      the same for people           app       the page at `/`
//! ```

mod app;
mod body;
mod document;
mod edge;
mod events;
mod files;
mod form;
mod health;
mod jobs;
pub mod keys;
mod line;
mod page;
mod photos;
mod position;
mod problem;
mod reading;
mod samples;
mod serve;
mod shares;
mod spool;
mod submit;
mod upload;
mod view;

use std::collections::BTreeMap;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::middleware::{from_fn, from_fn_with_state};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio_util::sync::CancellationToken;
use tower_http::catch_panic::CatchPanicLayer;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::blobs::Blobs;
use crate::health::Health;
use crate::photo::Decoder;
use crate::store::Store;
pub use document::openapi;
pub use health::{Operations, count_queue};
pub(crate) use keys::is_loopback;
pub use photos::{Spotted, Spotter};
pub use problem::{Kind as ProblemKind, Problem};
pub use serve::{Patience, serve};

/// Who may call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Auth {
    /// Whoever has an API key.
    Keys,
    /// Whoever reaches the loopback interface; the caller sees to it that nobody else does.
    None,
}

/// How requests are answered.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What URLs begin with, without a slash at the end.
    pub public_url: String,
    /// Who may call.
    pub auth: Auth,
    /// Largest photo, in bytes.
    pub photo_bytes_max: usize,
    /// How long an upload may take to arrive.
    pub upload_time: Duration,
    /// Uploads that are on their way or wait for their turn; each has up to five photos on disk.
    pub uploads_max: usize,
    /// Where they lie until they are worked on: a directory, made if it is not there.
    pub spool: PathBuf,
    /// Requests answered at once.
    pub requests_max: usize,
    /// Requests that wait for a change.
    pub waits_max: usize,
    /// Event streams and downloads at once.
    pub streams_max: usize,
    /// Waiting jobs of one tenant.
    pub queue_max: u64,
    /// Attempts that a job may have.
    pub attempts_max: i64,
    /// Life of a URL to an object.
    pub url_time: Duration,
    /// How long a key that was looked up is believed: one that is revoked works no longer than this.
    pub key_time: Duration,
    /// For each method, training options that suit the models of the workers, as the page offers them.
    pub suggested: BTreeMap<String, serde_json::Value>,
}

impl Default for Settings {
    /// A server on loopback without keys.
    fn default() -> Self {
        Self {
            public_url: "http://127.0.0.1:8080".into(),
            auth: Auth::None,
            photo_bytes_max: 15 << 20,
            upload_time: Duration::from_mins(1),
            uploads_max: 64,
            spool: tempfile::env::temp_dir(),
            requests_max: 256,
            waits_max: 512,
            streams_max: 1000,
            queue_max: 10_000,
            attempts_max: 3,
            url_time: Duration::from_hours(1),
            key_time: Duration::from_secs(30),
            suggested: BTreeMap::new(),
        }
    }
}

/// What all handlers share. Cheap to clone.
#[derive(Clone)]
pub struct Front(Arc<Shared>);

/// What the clones of a [`Front`] share.
pub struct Shared {
    store: Store,
    blobs: Blobs,
    decoder: Decoder,
    settings: Settings,
    operations: Arc<Operations>,
    closing: CancellationToken,
    keys: keys::Keys,
    shares: shares::Shares,
    line: line::Line,
    followers: position::Followers,
    spotter: Option<Arc<dyn Spotter>>,
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
            keys: keys::Keys::new(store.clone(), settings.key_time),
            shares: shares::Shares::new(settings.requests_max, settings.waits_max, settings.streams_max),
            line: line::Line::new(settings.uploads_max, decoder.n_parallel()),
            followers: position::Followers::default(),
            store,
            blobs,
            decoder,
            settings,
            closing,
            spotter,
        }))
    }

    /// All the service.
    pub fn router(&self) -> Router {
        let api = Router::from(api()).layer(from_fn_with_state(self.clone(), edge::admit));
        dressed(
            api.merge(Router::from(about()))
                .merge(app::routes())
                .merge(page::routes())
                .with_state(self.clone()),
        )
    }

    /// What operators ask for, without keys, for a listener of its own.
    pub fn operations(&self) -> Router {
        self.operations.clone().router()
    }
}

fn dressed(router: Router) -> Router {
    router.layer(CatchPanicLayer::custom(edge::panicked)).layer(from_fn(edge::finish))
}

/// Everything that needs a key.
fn api() -> OpenApiRouter<Front> {
    let short = OpenApiRouter::new()
        .routes(routes!(jobs::list_jobs))
        .routes(routes!(jobs::get_job, jobs::delete_job))
        .routes(routes!(jobs::cancel_job))
        .routes(routes!(jobs::get_report))
        .routes(routes!(jobs::list_artifacts))
        .routes(routes!(jobs::get_artifact))
        .routes(routes!(samples::create_sample))
        .routes(routes!(samples::list_samples))
        .routes(routes!(samples::get_sample, samples::delete_sample))
        .routes(routes!(samples::cancel_sample))
        .routes(routes!(samples::retry_sample))
        .routes(routes!(samples::get_image))
        .routes(routes!(health::metrics))
        .layer(from_fn(edge::hurry));
    let uploads = OpenApiRouter::new()
        .routes(routes!(jobs::create_job))
        .routes(routes!(jobs::retry_job))
        .routes(routes!(photos::inspect_photos))
        .layer(from_fn(body::linger));
    let streams = OpenApiRouter::new().routes(routes!(events::job_events)).routes(routes!(files::get_file));
    OpenApiRouter::new().merge(short).merge(uploads).merge(streams)
}

/// What anybody may know.
fn about() -> OpenApiRouter<Front> {
    OpenApiRouter::new().routes(routes!(health::healthz)).routes(routes!(health::readyz))
}
