//! How a device's time is divided between a training and the samples that are drawn beside it.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What time it is on a device. Only differences count.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> Duration + Send + Sync>);

impl Clock {
    /// A clock of one's own: for tests that count device time exactly.
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

/// Device time that a job has used, told by the device's thread and read by the job's task.
#[derive(Debug, Default)]
pub(super) struct Meter(AtomicU64);

impl Meter {
    pub(super) fn add(&self, time: Duration) {
        self.0.fetch_add(time.as_micros() as u64, Ordering::Relaxed);
    }

    pub(super) fn total(&self) -> Duration {
        Duration::from_micros(self.0.load(Ordering::Relaxed))
    }
}

/// The account of one device. Samples may begin while they owe the training nothing; each one then owes it time enough
/// to keep to the share. Nothing can be saved up, so that no crowd of samples has a turn to itself.
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

/// What the samples are drawn beside.
#[derive(Debug)]
enum Beside {
    Nothing { since: Duration },
    Training { drawing_since: Option<Duration> },
}

impl Account {
    /// `share` of the device is for samples while it trains: above 0, at most 1.
    pub(super) fn new(share: f64, now: Duration) -> Self {
        let price = (1.0 - share) / share;
        let beside = Beside::Nothing { since: now };
        Self(Arc::new(Mutex::new(State { price, owed: Duration::ZERO, beside })))
    }

    /// A training begins. What is still owed from an earlier one is owed to it, less the time between.
    pub(super) fn begin(&self, now: Duration) {
        let mut state = self.lock();
        if let Beside::Nothing { since } = state.beside {
            state.owed = state.owed.saturating_sub(now.saturating_sub(since));
            state.beside = Beside::Training { drawing_since: None };
        }
    }

    /// The training has ended.
    pub(super) fn end(&self, now: Duration) {
        self.lock().beside = Beside::Nothing { since: now };
    }

    /// The training went on for so long.
    pub(super) fn trained(&self, time: Duration) {
        let mut state = self.lock();
        state.owed = state.owed.saturating_sub(time);
    }

    /// A batch is about to be drawn.
    pub(super) fn draws(&self, now: Duration) {
        if let Beside::Training { drawing_since } = &mut self.lock().beside {
            *drawing_since = Some(now);
        }
    }

    /// A batch was drawn, and took so long.
    pub(super) fn drew(&self, time: Duration) {
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

    /// How long another sample would wait, as far as can be told.
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

    /// The part of the time that a training keeps for itself beside samples that never end, but for the first batch, which
    /// is drawn before anything is owed.
    fn kept(share: f64, step: Duration, batch: Duration) -> f64 {
        let account = Account::new(share, Duration::ZERO);
        account.begin(Duration::ZERO);
        let (mut trained, mut drawn) = (Duration::ZERO, Duration::ZERO);
        while trained < step * 10_000 {
            trained += step;
            account.trained(step);
            while account.may_draw() && drawn < step * 100_000 {
                account.draws(trained + drawn);
                account.drew(batch);
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
        account.begin(Duration::ZERO);
        account.drew(SECOND * 100);
        assert!(account.may_draw());
        assert_eq!(account.wait(SECOND), Duration::ZERO);
    }

    #[test]
    fn what_is_owed_when_a_training_ends_is_owed_to_the_next_but_not_for_ever() {
        let account = Account::new(0.5, Duration::ZERO);
        account.begin(Duration::ZERO);
        account.drew(SECOND * 10);
        account.end(SECOND * 10);
        account.drew(SECOND * 5);
        assert_eq!(account.wait(SECOND * 11), Duration::ZERO, "nothing is trained");
        account.begin(SECOND * 14);
        assert_eq!(account.wait(SECOND * 14), SECOND * 6);
        account.end(SECOND * 14);
        account.begin(SECOND * 60);
        assert!(account.may_draw());
    }

    #[test]
    fn the_wait_grows_with_the_batch_that_is_being_drawn() {
        let account = Account::new(0.25, Duration::ZERO);
        account.begin(Duration::ZERO);
        account.draws(SECOND);
        assert_eq!(account.wait(SECOND * 3), SECOND * 6);
        account.drew(SECOND * 2);
        assert_eq!(account.wait(SECOND * 9), SECOND * 6);
        account.trained(SECOND * 5);
        assert_eq!(account.wait(SECOND * 9), SECOND);
        assert!(!account.may_draw());
        account.trained(SECOND * 5);
        assert!(account.may_draw());
    }
}
