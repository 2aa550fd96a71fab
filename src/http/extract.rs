//! Extractors for path and query parameters, whose rejections are problems.

use axum::extract::{FromRequestParts, Path, Query};
use axum::http::request::Parts;
use serde::de::DeserializeOwned;

use super::problem::{Kind, Problem, excerpt};
use super::state::AppState;
use crate::job::JobId;

/// The id in a path. Anything else is answered like an unknown id.
pub(super) struct PathId(pub(super) JobId);

impl FromRequestParts<AppState> for PathId {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &AppState) -> Result<Self, Problem> {
        let path = Path::<String>::from_request_parts(parts, app).await;
        let id = path.ok().and_then(|Path(text)| text.parse().ok());
        id.map(Self).ok_or_else(|| Problem::not_found("job"))
    }
}

/// The id and the name after it in a path.
pub(super) struct PathIdAndName(pub(super) JobId, pub(super) String);

impl FromRequestParts<AppState> for PathIdAndName {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &AppState) -> Result<Self, Problem> {
        let path = Path::<(String, String)>::from_request_parts(parts, app).await;
        let within = path.ok().and_then(|Path((id, name))| Some(Self(id.parse().ok()?, name)));
        within.ok_or_else(|| Problem::not_found("job"))
    }
}

/// The query; unknown parameters are refused.
pub(super) struct ApiQuery<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequestParts<AppState> for ApiQuery<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &AppState) -> Result<Self, Problem> {
        Query::try_from_uri(&parts.uri).map(|Query(query)| Self(query)).map_err(|error| {
            // The source names the parameter; the rejection itself is general.
            let cause =
                std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
            Problem::new(Kind::BadParameter, format!("the query: {}", excerpt(&cause)))
        })
    }
}
