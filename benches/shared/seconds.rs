//! Seconds on a command line.

use std::time::Duration;

/// More than 0 and at most a day.
pub(crate) fn parse(text: &str) -> Result<Duration, String> {
    let wrong = || format!("wanted seconds, more than 0 and at most 86400, got {text}");
    let duration = Duration::try_from_secs_f64(text.parse().map_err(|_| wrong())?).map_err(|_| wrong())?;
    if duration.is_zero() || duration > Duration::from_hours(24) { Err(wrong()) } else { Ok(duration) }
}
