//! Pagination and filters of lists, newest first.

use axum::Json;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::IntoParams;
use uuid::Uuid;

use super::problem::{Kind as ProblemKind, Problem};
use super::state::AppState;
use crate::job::{Job, JobId, Kind, State, TenantId};
use crate::store::Filter;

/// Query parameters of a list.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct PageQuery {
    /// Maximum number of entries.
    #[param(minimum = 1, maximum = 200, default = 50)]
    limit: Option<u32>,
    /// The `next_cursor` of the page before.
    #[param(pattern = "^[0-9a-f]{32}$", min_length = 32, max_length = 32)]
    cursor: Option<String>,
    /// Only jobs in this state.
    state: Option<State>,
    /// Only trainings of this class.
    #[param(min_length = 1, max_length = 64)]
    class_name: Option<String>,
    /// Only jobs accepted later than this (RFC 3339).
    #[param(value_type = Option<String>, format = DateTime)]
    created_after: Option<String>,
    /// Only samples drawn with this training.
    #[param(value_type = Option<Uuid>)]
    job_id: Option<String>,
}

impl PageQuery {
    /// The filter, the cursor and the limit.
    pub(super) fn parse(&self, kind: Kind) -> Result<(Filter, Option<JobId>, u32), Problem> {
        let invalid = |name: &str, wanted: &str| {
            Problem::new(ProblemKind::BadParameter, format!("{name}: wanted {wanted}"))
        };
        let limit = self.limit.unwrap_or(50);
        if !(1..=200).contains(&limit) {
            return Err(invalid("limit", "1 to 200"));
        }
        let cursor = self.cursor.as_deref().map(|text| {
            let id = Uuid::try_parse(text).ok().filter(|id| id.simple().to_string() == text);
            id.map(JobId).ok_or_else(|| invalid("cursor", "the next_cursor of a page"))
        });
        let created_after = self.created_after.as_deref().map(|text| {
            let time: Option<Timestamp> = text.parse().ok();
            time.map(Timestamp::as_millisecond)
                .ok_or_else(|| invalid("created_after", "a time as in RFC 3339"))
        });
        let class_name = self.class_name.as_deref().map(|text| {
            crate::job::class_name(text).map_err(|invalid| {
                Problem::new(ProblemKind::BadParameter, format!("class_name: {}", invalid.message))
            })
        });
        let parent = self.job_id.as_deref().map(|text| text.parse().map_err(|_| invalid("job_id", "an id")));
        let filter = Filter {
            kind: Some(kind),
            state: self.state,
            class_name: class_name.transpose()?,
            created_after_ms: created_after.transpose()?,
            parent: parent.transpose()?,
        };
        Ok((filter, cursor.transpose()?, limit))
    }

    /// URL of the page after `cursor`.
    fn next_url(&self, base: &str, cursor: &str) -> String {
        let state = self.state.map(|state| state.to_string());
        let filters = [
            ("state", state.as_ref()),
            ("class_name", self.class_name.as_ref()),
            ("created_after", self.created_after.as_ref()),
            ("job_id", self.job_id.as_ref()),
        ];
        let filters =
            filters.iter().filter_map(|(name, value)| Some(format!("&{name}={}", percent_encode((*value)?))));
        let filters: Vec<_> = filters.collect();
        format!("{base}?limit={}&cursor={cursor}{}", self.limit.unwrap_or(50), filters.concat())
    }
}

/// Percent-encodes all but the unreserved characters (RFC 3986).
fn percent_encode(text: &str) -> String {
    let is_unreserved = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    let escape =
        |byte: u8| if is_unreserved(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    text.bytes().map(escape).collect()
}

/// One page of a list, newest first.
pub(super) struct Page {
    /// The rows of the page.
    pub(super) jobs: Vec<Job>,
    /// Cursor of the next page, if there is one.
    pub(super) next_cursor: Option<String>,
}

impl Page {
    pub(super) async fn read(
        app: &AppState,
        tenant: TenantId,
        query: &PageQuery,
        kind: Kind,
    ) -> Result<Self, Problem> {
        let (filter, cursor, limit) = query.parse(kind)?;
        let mut jobs = app.store.list(tenant, &filter, cursor, limit + 1).await?;
        let has_more = jobs.len() > limit as usize;
        jobs.truncate(limit as usize);
        let next_cursor = jobs.last().filter(|_| has_more).map(|job| job.id.0.simple().to_string());
        Ok(Self { jobs, next_cursor })
    }

    /// The response, with the `Link` to the next page.
    pub(super) fn respond(
        next_cursor: Option<&str>,
        query: &PageQuery,
        base: &str,
        body: impl Serialize,
    ) -> Response {
        let mut response = Json(body).into_response();
        if let Some(cursor) = next_cursor {
            let link = format!("<{}>; rel=\"next\"", query.next_url(base, cursor));
            if let Ok(link) = HeaderValue::from_str(&link) {
                response.headers_mut().insert(header::LINK, link);
            }
        }
        response
    }
}
