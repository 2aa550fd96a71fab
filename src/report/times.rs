//! How long each phase of a training took.

use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use crate::job::Phase;

/// Seconds by phase, from what a watcher hears and its clock.
#[derive(Clone, Debug, Default)]
pub struct Times {
    /// The phase at hand, and since when.
    since: Option<(Phase, Instant)>,
    gone: Vec<(Phase, Duration)>,
}

impl Times {
    /// Hears that the training is at `phase`.
    pub fn hear(&mut self, phase: Phase, now: Instant) {
        if self.since.is_none_or(|(before, _)| before != phase) {
            self.close(now);
            self.since = Some((phase, now));
        }
    }

    /// Seconds of each phase so far, in their order: `{"preparing": 1.5, ..}`.
    pub fn seconds(&mut self, now: Instant) -> Value {
        self.close(now);
        let seconds = |duration: &Duration| (duration.as_secs_f64() * 1000.0).round() / 1000.0;
        let all = self.gone.iter().map(|(phase, gone)| (phase.to_string(), json!(seconds(gone))));
        Value::Object(all.collect::<Map<_, _>>())
    }

    fn close(&mut self, now: Instant) {
        let Some((phase, since)) = self.since.take() else { return };
        let took = now.saturating_duration_since(since);
        match self.gone.iter_mut().find(|(one, _)| *one == phase) {
            Some((_, gone)) => *gone += took,
            None => self.gone.push((phase, took)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_phase_has_its_seconds_even_if_it_comes_twice() {
        let (mut times, begin) = (Times::default(), Instant::now());
        let at = |ms| begin + Duration::from_millis(ms);
        for (phase, ms) in [(Phase::Preparing, 0), (Phase::Training, 500), (Phase::Training, 700)] {
            times.hear(phase, at(ms));
        }
        for (phase, ms) in [(Phase::Evaluating, 1500), (Phase::Training, 1750), (Phase::Drawing, 2750)] {
            times.hear(phase, at(ms));
        }
        let wanted = json!({"preparing": 0.5, "training": 2.0, "evaluating": 0.25, "drawing": 0.125});
        assert_eq!(times.seconds(at(2875)), wanted);
    }
}
