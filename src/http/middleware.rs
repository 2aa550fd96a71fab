//! Middleware of every request: id, log line, metrics, time limit, problem bodies and security headers.

use std::any::Any;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::Body;
use axum::extract::{MatchedPath, Request};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use tower_http::catch_panic::CatchPanicLayer;
use tracing::Instrument;
use uuid::Uuid;

use super::prefer::preferred_wait;
use super::problem::{self, Kind, Problem};
use crate::clock;
use crate::telemetry;

/// Identifies a request in logs.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const REQUEST_ID_CHARS_MAX: usize = 64;

const TIME_MAX: Duration = Duration::from_secs(30);

/// Adds the layers that all routes have, those of operators too.
pub(super) fn with_base_layers(router: Router) -> Router {
    router.layer(CatchPanicLayer::custom(panic_response)).layer(from_fn(observe))
}

/// The outermost layer: assigns the request id, writes problem bodies, logs one line and records metrics.
async fn observe(request: Request, next: Next) -> Response {
    let started = Instant::now();
    let id = request_id(request.headers());
    let method = method_label(request.method());
    let is_head = request.method() == Method::HEAD;
    let route = request.extensions().get::<MatchedPath>().map_or("unmatched", MatchedPath::as_str).to_owned();
    let span = tracing::info_span!("request", request.id = %id, method, route);
    let traceparent = request.headers().get("traceparent").and_then(|value| value.to_str().ok());
    telemetry::set_parent(&span, traceparent);
    let running = RunningGuard::new();
    let response = next.run(request).instrument(span.clone()).await;
    drop(running);

    let mut response = finalize(response, &id, is_head);
    let (status, elapsed) = (response.status().as_u16(), started.elapsed());
    telemetry::record_status(&span, status);
    span.in_scope(|| tracing::info!(status, duration_ms = elapsed.as_millis() as u64, "request answered"));
    let labels = [("method", method.to_owned()), ("route", route), ("status", status.to_string())];
    metrics::counter!("hypnos_http_requests_total", &labels).increment(1);
    metrics::histogram!("hypnos_http_request_seconds", &labels).record(elapsed.as_secs_f64());
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}

/// A method as a log field and metric label. Unknown methods share one label, since clients can invent any number.
fn method_label(method: &Method) -> &'static str {
    const KNOWN: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT"];
    KNOWN.into_iter().find(|name| method.as_str() == *name).unwrap_or("other")
}

/// Counts a request as running until dropped; its client may disconnect at any time.
struct RunningGuard;

impl RunningGuard {
    fn new() -> Self {
        metrics::gauge!("hypnos_http_requests_running").increment(1.0);
        Self
    }
}

impl Drop for RunningGuard {
    fn drop(&mut self) {
        metrics::gauge!("hypnos_http_requests_running").decrement(1.0);
    }
}

/// The client's own id if it is valid, else a new one.
fn request_id(headers: &HeaderMap) -> String {
    let is_valid = |id: &&str| {
        let plain = id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
        (1..=REQUEST_ID_CHARS_MAX).contains(&id.len()) && plain
    };
    let client_id = headers.get(REQUEST_ID).and_then(|id| id.to_str().ok()).filter(is_valid);
    client_id.map_or_else(|| new_id().to_string(), ToOwned::to_owned)
}

/// A UUID of version 7 whose random part is drawn once per process and counted up, so that no request needs a system
/// call for random numbers.
fn new_id() -> Uuid {
    static PROCESS: LazyLock<u128> = LazyLock::new(|| Uuid::now_v7().as_u128());
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = u128::from(COUNT.fetch_add(1, Ordering::Relaxed));
    let bytes = PROCESS.wrapping_add(count).to_be_bytes();
    let rest: &[u8; 10] = bytes.last_chunk().expect("of sixteen bytes");
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    uuid::Builder::from_unix_timestamp_millis(now.as_millis() as u64, rest).into_uuid()
}

/// Writes the body of a problem, and adds security headers to every response.
fn finalize(mut response: Response, request_id: &str, is_head: bool) -> Response {
    let problem = response.extensions_mut().remove::<Problem>().or_else(|| router_problem(&response));
    if let Some(problem) = problem {
        let document = serde_json::to_vec(&problem.document(request_id)).expect("a problem is plain JSON");
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(problem::CONTENT_TYPE));
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(document.len()));
        *response.body_mut() = if is_head { Body::empty() } else { document.into() };
    }
    let fixed = [
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CONTENT_SECURITY_POLICY, "default-src 'none'; frame-ancestors 'none'"),
        (header::CACHE_CONTROL, "no-store"),
    ];
    for (name, value) in fixed {
        response.headers_mut().entry(name).or_insert(HeaderValue::from_static(value));
    }
    response
}

/// The problem of a response that the router itself made, which has no body.
fn router_problem(response: &Response) -> Option<Problem> {
    match response.status() {
        StatusCode::NOT_FOUND => Some(Problem::not_found("path")),
        StatusCode::METHOD_NOT_ALLOWED => {
            let allow = response.headers().get(header::ALLOW).and_then(|allow| allow.to_str().ok());
            let detail = format!("this path supports {}", allow.unwrap_or("no method"));
            Some(Problem::new(Kind::MethodNotAllowed, detail))
        }
        _ => None,
    }
}

/// The response to a request whose handler panicked.
fn panic_response(panic: Box<dyn Any + Send>) -> Response {
    let text = panic.downcast_ref::<&str>().copied().map(ToOwned::to_owned);
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
    tracing::error!(panic = %text.escape_debug(), "request handler panicked");
    Problem::new(Kind::Internal, "an internal error occurred").into_response()
}

/// Limits a response to half a minute, plus the time that its client is willing to wait.
pub(super) async fn time_limit(request: Request, next: Next) -> Response {
    let time = TIME_MAX + preferred_wait(request.headers()).unwrap_or_default();
    // A request that changes something may have been executed.
    let kind = if request.method().is_safe() { Kind::Overloaded } else { Kind::OutcomeUnknown };
    match clock::timeout(time, next.run(request)).await {
        Ok(response) => response,
        Err(_) => Problem::new(kind, "the request took too long").into_response(),
    }
}
