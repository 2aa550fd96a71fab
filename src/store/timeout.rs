//! Time limits of statements and commits.

use std::io;
use std::time::Duration;

use crate::clock;

/// How long one statement may take before the database counts as unavailable: longer than the server's own limit.
pub(super) const STATEMENT_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a commit may take before its outcome counts as unknown. The server has no limit for it.
pub(super) const COMMIT_TIMEOUT: Duration = Duration::from_secs(10);

/// Limits the time of a request to the database: a host that vanished never answers. Every request passes here.
///
/// The work is boxed; otherwise every future that waits for it would hold it twice, and so on outwards.
pub(super) fn with_timeout<T>(
    limit: Duration,
    work: impl Future<Output = sqlx::Result<T>>,
) -> impl Future<Output = sqlx::Result<T>> {
    let work = Box::pin(work);
    async move {
        let timed_out =
            || io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {} s", limit.as_secs()));
        clock::timeout(limit, work).await.unwrap_or_else(|_| Err(timed_out().into()))
    }
}
