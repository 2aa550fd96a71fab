//! How long each phase of a training takes.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::job::Phase;

/// Measures the phases of a training by its caller's clock.
#[derive(Clone, Debug, Default)]
pub struct PhaseTimes {
    /// The current phase, and when it began.
    current: Option<(Phase, Instant)>,
    finished: BTreeMap<Phase, Duration>,
}

impl PhaseTimes {
    /// Notes that the training is in `phase`, which may have begun earlier.
    pub fn enter(&mut self, phase: Phase, now: Instant) {
        if self.current.is_none_or(|(current, _)| current != phase) {
            self.finish(now);
            self.current = Some((phase, now));
        }
    }

    /// Ends the current phase. Seconds of each phase that was entered, to the millisecond.
    pub fn seconds(&mut self, now: Instant) -> BTreeMap<Phase, f64> {
        self.finish(now);
        let seconds = |duration: &Duration| (duration.as_secs_f64() * 1000.0).round() / 1000.0;
        self.finished.iter().map(|(&phase, duration)| (phase, seconds(duration))).collect()
    }

    fn finish(&mut self, now: Instant) {
        if let Some((phase, began)) = self.current.take() {
            *self.finished.entry(phase).or_default() += now.saturating_duration_since(began);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_phase_has_its_seconds_even_if_it_comes_twice() {
        let (mut times, begin) = (PhaseTimes::default(), Instant::now());
        let at = |ms| begin + Duration::from_millis(ms);
        for (phase, ms) in [(Phase::Preparing, 0), (Phase::Training, 500), (Phase::Training, 700)] {
            times.enter(phase, at(ms));
        }
        for (phase, ms) in [(Phase::Evaluating, 1500), (Phase::Training, 1750), (Phase::Drawing, 2750)] {
            times.enter(phase, at(ms));
        }
        let wanted = [
            (Phase::Preparing, 0.5),
            (Phase::Training, 2.0),
            (Phase::Evaluating, 0.25),
            (Phase::Drawing, 0.125),
        ];
        assert_eq!(times.seconds(at(2875)), BTreeMap::from(wanted));
    }
}
