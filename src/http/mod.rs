//! The HTTP API: requests become rows in the database; workers turn rows into results.
//!
//! A handler authenticates its caller, checks the request, reads or writes a row, and answers. Nothing that a client
//! claims is trusted: `Host`, `X-Forwarded-*`, content types and file names.
//!
//! ```text
//! serve, connection             the accept loop; timeouts of a connection
//! router, routes, middleware    paths to handlers; request id, log line, metrics and time limit of every request
//! state, settings               what all handlers share
//! keys, auth, loopback          API keys; a request's caller; checks of a server without keys
//! extract, pagination           path and query parameters; lists page by page
//! conditional, prefer, long_poll    ETag and If-None-Match; Prefer: wait; answers that wait for a change
//! body, json, multipart, linger     bounded bodies; JSON; multipart/form-data; lingering close
//! upload, upload_queue, spool   photos of a form to objects; admission of uploads; temporary storage on disk
//! idempotency, submit           Idempotency-Key; enqueuing jobs
//! fair_pool, activity           concurrency limits shared by tenants; time since the last activity
//! jobs, samples, models, photos, events, files, health    the handlers
//! view, problem                 JSON of a row; RFC 9457 problems
//! queue_position                a queued job's position, polled with bounded cost
//! operations                    health checks and metrics, also for a listener of their own
//! vocabularies                  the words that models know, cached
//! product_detector              interface to the model that finds the product in a photo
//! openapi, reference, ui        the OpenAPI document; the same as a page at /docs; the page at /
//! ```

mod activity;
mod auth;
mod body;
mod conditional;
mod connection;
mod events;
mod extract;
mod fair_pool;
mod files;
mod health;
mod idempotency;
mod jobs;
mod json;
pub mod keys;
mod linger;
mod long_poll;
mod loopback;
mod middleware;
mod models;
mod multipart;
mod openapi;
mod operations;
mod pagination;
mod photos;
mod prefer;
mod problem;
mod product_detector;
mod queue_position;
mod reference;
mod router;
mod routes;
mod samples;
mod serve;
mod settings;
mod spool;
mod state;
mod submit;
mod ui;
mod upload;
mod upload_queue;
mod view;
mod vocabularies;

pub use connection::Timeouts;
pub(crate) use loopback::is_loopback;
pub use openapi::openapi;
pub use operations::{Operations, update_queue_metrics};
pub use problem::{Kind as ProblemKind, Problem};
pub use product_detector::{DetectedProduct, ProductDetector};
pub use serve::serve;
pub use settings::{Auth, Settings};
pub use state::AppState;
