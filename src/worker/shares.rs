//! Divides a device's time between a training and the samples that are drawn beside it.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The clock that device time is measured by. Only differences count.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> Duration + Send + Sync>);

impl Clock {
    /// A clock that the caller sets: for tests that count device time exactly.
    pub fn new(now: impl Fn() -> Duration + Send + Sync + 'static) -> Self {
        Self(Arc::new(now))
    }

    pub(super) fn now(&self) -> Duration {
        (self.0)()
    }
}

impl Default for Clock {
    fn default() -> Self {
        let began = Instant::now();
        Self::new(move || began.elapsed())
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clock")
    }
}

/// Device time that a job has used, added by the device's thread and read by the job's task.
#[derive(Debug, Default)]
pub(super) struct DeviceTime(AtomicU64);

impl DeviceTime {
    pub(super) fn add(&self, time: Duration) {
        self.0.fetch_add(time.as_micros() as u64, Ordering::Relaxed);
    }

    pub(super) fn total(&self) -> Duration {
        Duration::from_micros(self.0.load(Ordering::Relaxed))
    }
}

/// The account of one device. A batch of a sample may begin while samples owe the training nothing; afterwards they owe
/// it enough time to keep to their share. Time cannot be saved up, so that no burst of samples gets the device for
/// itself.
#[derive(Clone, Debug)]
pub(super) struct Account(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    /// Training time owed for each second of drawing.
    price: f64,
    /// Training time that must pass before the next batch of a sample.
    owed: Duration,
    beside: Beside,
}

/// What samples are drawn beside.
#[derive(Debug)]
enum Beside {
    Nothing { since: Duration },
    Training { drawing_since: Option<Duration> },
}

impl Account {
    /// `share` of the device is for samples while it trains, 0 to 1. With 0 the driver gives it no samples then.
    pub(super) fn new(share: f64, now: Duration) -> Self {
        let price = if share > 0.0 { (1.0 - share) / share } else { 0.0 };
        let beside = Beside::Nothing { since: now };
        Self(Arc::new(Mutex::new(State { price, owed: Duration::ZERO, beside })))
    }

    /// A training begins. It is owed what an earlier one still was, less the time in between.
    pub(super) fn training_began(&self, now: Duration) {
        let mut state = self.lock();
        if let Beside::Nothing { since } = state.beside {
            state.owed = state.owed.saturating_sub(now.saturating_sub(since));
            state.beside = Beside::Training { drawing_since: None };
        }
    }

    /// The training ends.
    pub(super) fn training_ended(&self, now: Duration) {
        self.lock().beside = Beside::Nothing { since: now };
    }

    /// The training took `time` of the device.
    pub(super) fn trained(&self, time: Duration) {
        let mut state = self.lock();
        state.owed = state.owed.saturating_sub(time);
    }

    /// A batch begins.
    pub(super) fn batch_began(&self, now: Duration) {
        if let Beside::Training { drawing_since } = &mut self.lock().beside {
            *drawing_since = Some(now);
        }
    }

    /// A batch ends; it took `time` of the device.
    pub(super) fn batch_ended(&self, time: Duration) {
        let mut state = self.lock();
        if let Beside::Training { drawing_since } = &mut state.beside {
            *drawing_since = None;
            let price = state.price;
            state.owed += time.mul_f64(price);
        }
    }

    /// Whether a batch may be drawn now.
    pub(super) fn may_draw(&self) -> bool {
        self.lock().owed.is_zero()
    }

    /// Estimate of how long another sample would wait.
    pub(super) fn wait(&self, now: Duration) -> Duration {
        let state = self.lock();
        match state.beside {
            Beside::Nothing { .. } => Duration::ZERO,
            Beside::Training { drawing_since } => {
                let drawn = drawing_since.map_or(Duration::ZERO, |since| now.saturating_sub(since));
                state.owed + drawn.mul_f64(state.price)
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// The part of the time that a training keeps beside samples that never end, without the first batch, which is
    /// drawn before anything is owed.
    fn kept(share: f64, step: Duration, batch: Duration) -> f64 {
        let account = Account::new(share, Duration::ZERO);
        account.training_began(Duration::ZERO);
        let (mut trained, mut drawn) = (Duration::ZERO, Duration::ZERO);
        while trained < step * 10_000 {
            trained += step;
            account.trained(step);
            while account.may_draw() && drawn < step * 100_000 {
                account.batch_began(trained + drawn);
                account.batch_ended(batch);
                drawn += batch;
            }
        }
        trained.as_secs_f64() / (trained + drawn).saturating_sub(batch).as_secs_f64()
    }

    #[test]
    fn samples_take_at_most_their_share_whatever_steps_and_batches_take() {
        for share in [0.1, 0.5, 0.9] {
            for (step, batch) in [(SECOND, SECOND / 3), (SECOND, SECOND * 7), (SECOND / 50, SECOND)] {
                let kept = kept(share, step, batch);
                assert!(kept > 1.0 - share - 1e-9, "{share}: {kept} of {step:?} and {batch:?}");
            }
            let kept = kept(share, SECOND / 50, SECOND);
            assert!((kept - (1.0 - share)).abs() < 0.02, "and all of it where they want it: {kept}");
        }
    }

    #[test]
    fn with_a_share_of_one_nothing_is_owed() {
        let account = Account::new(1.0, Duration::ZERO);
        account.training_began(Duration::ZERO);
        account.batch_ended(SECOND * 100);
        assert!(account.may_draw());
        assert_eq!(account.wait(SECOND), Duration::ZERO);
    }

    #[test]
    fn what_is_owed_when_a_training_ends_is_owed_to_the_next_but_not_for_ever() {
        let account = Account::new(0.5, Duration::ZERO);
        account.training_began(Duration::ZERO);
        account.batch_ended(SECOND * 10);
        account.training_ended(SECOND * 10);
        account.batch_ended(SECOND * 5);
        assert_eq!(account.wait(SECOND * 11), Duration::ZERO, "nothing is trained");
        account.training_began(SECOND * 14);
        assert_eq!(account.wait(SECOND * 14), SECOND * 6);
        account.training_ended(SECOND * 14);
        account.training_began(SECOND * 60);
        assert!(account.may_draw());
    }

    #[test]
    fn the_wait_grows_with_the_batch_that_is_being_drawn() {
        let account = Account::new(0.25, Duration::ZERO);
        account.training_began(Duration::ZERO);
        account.batch_began(SECOND);
        assert_eq!(account.wait(SECOND * 3), SECOND * 6);
        account.batch_ended(SECOND * 2);
        assert_eq!(account.wait(SECOND * 9), SECOND * 6);
        account.trained(SECOND * 5);
        assert_eq!(account.wait(SECOND * 9), SECOND);
        assert!(!account.may_draw());
        account.trained(SECOND * 5);
        assert!(account.may_draw());
    }
}
