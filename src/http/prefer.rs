//! The request header `Prefer: wait=N` (RFC 7240).

use std::time::Duration;

use axum::http::HeaderMap;

/// Longest wait: proxies time out after a minute.
const WAIT_MAX: Duration = Duration::from_secs(50);

/// How long the client is willing to wait for a response, at most [`WAIT_MAX`].
pub(super) fn preferred_wait(headers: &HeaderMap) -> Option<Duration> {
    let all = headers.get_all("prefer").iter().filter_map(|value| value.to_str().ok());
    let mut preferences = all.flat_map(|value| value.split([',', ';']));
    let secs = preferences.find_map(|preference| {
        let (name, value) = preference.split_once('=')?;
        name.trim().eq_ignore_ascii_case("wait").then(|| value.trim().trim_matches('"').parse().ok())?
    })?;
    Some(Duration::from_secs(secs).min(WAIT_MAX))
}
