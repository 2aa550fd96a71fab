//! The page at `/`: a client of the API in a browser, made of three static files.

use axum::Router;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use super::state::AppState;

/// Pictures come from the object store, which may be another host; all else comes from this server.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
    img-src 'self' data: blob: http: https:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

pub(super) fn routes() -> Router<AppState> {
    Router::new()
        .route("/", get(|| async { file("text/html; charset=utf-8", include_str!("ui/index.html")) }))
        .route("/app.css", get(|| async { file("text/css; charset=utf-8", include_str!("ui/app.css")) }))
        .route("/app.js", get(|| async { file("text/javascript; charset=utf-8", include_str!("ui/app.js")) }))
}

fn file(content_type: &'static str, text: &'static str) -> Response {
    let headers = [
        (header::CONTENT_TYPE, content_type),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, text).into_response()
}
