//! `/healthz`, `/readyz` and `/metrics` among the API's operations.

use axum::extract::State;
use axum::response::Response;

use super::auth::Operator;
use super::operations::ALIVE;
use super::problem::Problem;
use super::state::AppState;

/// Says that the process lives
#[utoipa::path(
    get, path = "/healthz", tag = "operations", security(()),
    responses((status = 200, description = "It does", body = String, content_type = "text/plain")),
)]
pub(super) async fn healthz() -> &'static str {
    ALIVE
}

/// Says whether the server can serve
///
/// Database, schema and object store answer, one of the workers in the same process takes jobs, if there are some, and the
/// server is not about to end. An object store that is full only takes no uploads; the answer says so.
#[utoipa::path(
    get, path = "/readyz", tag = "operations", security(()),
    responses((status = 200, description = "It can", body = String, content_type = "text/plain")),
    extensions(("x-problems" = json!([]))),
)]
pub(super) async fn readyz(State(app): State<AppState>) -> Result<String, Problem> {
    app.operations.ready(false).await
}

/// Reads the server's figures
///
/// In the text format of Prometheus. They tell of all tenants: a key needs the scope `admin`.
#[utoipa::path(
    get, path = "/metrics", tag = "operations",
    responses((status = 200, description = "The figures", body = String, content_type = "text/plain")),
    extensions(("x-problems" = json!(["scope"]))),
)]
pub(super) async fn metrics(State(app): State<AppState>, _operator: Operator) -> Result<Response, Problem> {
    app.operations.metrics().await
}
