//! Logs a lasting failure at once and then less and less often.

use std::time::{Duration, Instant};

use tracing::{info, warn};

use crate::clock;

/// First wait before the same failure is logged again; doubled each time, up to [`INTERVAL_MAX`].
const INTERVAL: Duration = Duration::from_mins(1);
const INTERVAL_MAX: Duration = Duration::from_hours(6);

/// The failures of one maintenance service.
#[derive(Debug)]
pub(super) struct FailureLog {
    service: &'static str,
    last: Option<(Instant, Duration)>,
}

impl FailureLog {
    pub(super) fn new(service: &'static str) -> Self {
        Self { service, last: None }
    }

    /// Records the outcome of a round: the error, or none if it succeeded.
    pub(super) fn record(&mut self, error: Option<String>) {
        let service = self.service;
        let Some(error) = error else {
            if self.last.take().is_some() {
                info!(service, "maintenance recovered");
            }
            return;
        };
        let interval = match self.last {
            Some((at, interval)) if clock::since(at) < interval => return,
            Some((_, interval)) => (interval * 2).min(INTERVAL_MAX),
            None => INTERVAL,
        };
        self.last = Some((clock::now(), interval));
        warn!(service, error, "maintenance failed");
    }
}
