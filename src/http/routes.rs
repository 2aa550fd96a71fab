//! The API's operations with their routes and OpenAPI descriptions.

use axum::middleware::from_fn;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::linger::linger;
use super::state::AppState;
use super::{events, files, health, jobs, middleware, models, photos, samples};

/// Operations that need a key.
pub(super) fn api() -> OpenApiRouter<AppState> {
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
        .routes(routes!(models::list_models))
        .routes(routes!(health::metrics))
        .layer(from_fn(middleware::time_limit));
    let uploads = OpenApiRouter::new()
        .routes(routes!(jobs::create_job))
        .routes(routes!(jobs::retry_job))
        .routes(routes!(photos::inspect_photos))
        .layer(from_fn(linger));
    let streams = OpenApiRouter::new().routes(routes!(events::job_events)).routes(routes!(files::get_file));
    OpenApiRouter::new().merge(short).merge(uploads).merge(streams)
}

/// Operations that need no key.
pub(super) fn public() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(health::healthz)).routes(routes!(health::readyz))
}
