//! `/healthz`, `/readyz` and `/metrics` among the API's operations.

use axum::extract::State;
use axum::response::Response;

use super::auth::Operator;
use super::operations::ALIVE;
use super::problem::Problem;
use super::state::AppState;

/// Checks that the process is alive
#[utoipa::path(
    get, path = "/healthz", tag = "operations", security(()),
    responses((status = 200, description = "Alive", body = String, content_type = "text/plain")),
)]
pub(super) async fn healthz() -> &'static str {
    ALIVE
}

/// Checks that the server can serve requests
///
/// Ready means: the database, with the expected schema, and the object store answer; at least one of the workers in
/// this process takes jobs, if it has workers; and the server is not shutting down. With a full object store the server
/// is ready but refuses uploads; the answer says so.
#[utoipa::path(
    get, path = "/readyz", tag = "operations", security(()),
    responses((status = 200, description = "Ready", body = String, content_type = "text/plain")),
    extensions(("x-problems" = json!([]))),
)]
pub(super) async fn readyz(State(app): State<AppState>) -> Result<String, Problem> {
    app.operations.ready(false).await
}

/// Gets the server's metrics
///
/// In the text format of Prometheus. They cover all tenants, so a key needs the scope `admin`.
#[utoipa::path(
    get, path = "/metrics", tag = "operations",
    responses((status = 200, description = "The metrics", body = String, content_type = "text/plain")),
    extensions(("x-problems" = json!(["scope"]))),
)]
pub(super) async fn metrics(State(app): State<AppState>, _operator: Operator) -> Result<Response, Problem> {
    app.operations.metrics().await
}
