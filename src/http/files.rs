//! Signed URLs to objects, and `/v1/files`, which serves those of a local directory; S3 serves its own.

use axum::Extension;
use axum::body::Body;
use axum::extract::{Path, RawQuery, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use jiff::Timestamp;

use super::connection::Abort;
use super::problem::Problem;
use super::state::AppState;
use super::view::time;
use crate::blobs::Key;
use crate::job::{Object, PAGE, TenantId};

/// Fetches a file by a signed URL
///
/// The URL comes from an artifact or a picture and needs no key. `Range` is ignored: the whole file is sent.
#[utoipa::path(
    get, path = "/v1/files/{*key}", tag = "files",
    params(("key" = String, Path, description = "From the URL, which is to be used unchanged; contains slashes")),
    responses((status = 200, description = "The file", body = String, content_type = "application/octet-stream")),
    extensions(("x-problems" = json!(["url-forged", "url-expired", "not-found", "too-many-requests", "artifact-missing", "artifact-damaged"]))),
    security(()),
)]
pub(super) async fn get_file(
    State(app): State<AppState>,
    Path(key): Path<String>,
    RawQuery(query): RawQuery,
    abort: Option<Extension<Abort>>,
) -> Result<Response, Problem> {
    let object = app.blobs.verify(&key, query.as_deref().unwrap_or_default(), Timestamp::now())?;
    // The URL of a deleted job is invalid, although its objects may still be there for a moment.
    let Some(tenant) = owner(&app, &object).await? else { return Err(Problem::not_found("file")) };
    // A client that reads nothing would not notice that its permit is revoked, so the connection is closed.
    let abort = abort.map(|Extension(Abort(token))| token).unwrap_or_default();
    let permit = app.pools.streams.acquire_revocable(tenant, abort).await?;
    let bytes = app.blobs.stream(&object).await?;
    let bytes = bytes.inspect(move |_| permit.touch());
    let mut response = Body::from_stream(bytes).into_response();
    // Names and types of objects are chosen by the service, never by a client.
    let disposition = format!("inline; filename=\"{}\"", object.name);
    let headers = response.headers_mut();
    for (name, value) in
        [(header::CONTENT_TYPE, object.content_type), (header::CONTENT_DISPOSITION, disposition)]
    {
        if let Ok(value) = HeaderValue::from_str(&value) {
            headers.insert(name, value);
        }
    }
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(object.size));
    headers.insert(
        header::CONTENT_SECURITY_POLICY,
        HeaderValue::from_static(content_security_policy(&object.name)),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("private, max-age=3600, immutable"));
    headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("none"));
    Ok(response)
}

/// The tenant whose job has the object, if one still has.
async fn owner(app: &AppState, object: &Object) -> Result<Option<TenantId>, Problem> {
    let Some((tenant, job, _)) = Key::parse(&object.key).and_then(|key| key.owner()) else {
        return Ok(None);
    };
    let artifact = app.store.artifact(tenant, job, &object.name).await?;
    Ok(artifact.filter(|artifact| artifact.key == object.key).map(|_| tenant))
}

/// Lets a file do nothing in a browser; a report may show the pictures and styles that it contains.
fn content_security_policy(name: &str) -> &'static str {
    if name == PAGE {
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox"
    } else {
        "default-src 'none'; sandbox"
    }
}

/// A signed URL to an object, and when it expires.
pub(super) async fn signed_url(app: &AppState, object: &Object) -> Result<(String, String), Problem> {
    let (now, lifetime) = (Timestamp::now(), app.settings.url_time);
    let url = app.blobs.sign(object, lifetime, now).await?;
    let expires_ms = now.as_millisecond().saturating_add_unsigned(lifetime.as_millis() as u64);
    Ok((url, time(expires_ms)))
}

/// A redirect to an object's signed URL.
pub(super) async fn redirect(app: &AppState, object: &Object) -> Result<Response, Problem> {
    let (url, _) = signed_url(app, object).await?;
    let location = HeaderValue::from_str(&url).map_err(|error| Problem::internal(&error))?;
    Ok((StatusCode::TEMPORARY_REDIRECT, [(header::LOCATION, location)]).into_response())
}
