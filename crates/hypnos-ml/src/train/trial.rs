//! Scores of a few steps of a training, of which the best one is served.

use serde::Serialize;

/// What a few pictures of one step were worth. Numbers are f32, as a checkpoint keeps them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Trial {
    /// The step, counted from 1.
    pub step: u64,
    /// Likeness to the photos as a share of what they have among themselves, 0..1.
    pub likeness: f32,
    /// Adherence to prompts as a share of what the untrained model has, 0..1.
    pub adherence: f32,
}

impl Trial {
    /// A trial. Shares beyond 1 count as 1: a picture nearer to the photos than they are to one another is a copy, not
    /// a better one; those below 0, or none at all, as 0.
    pub fn new(step: u64, likeness: f64, adherence: f64) -> Self {
        let share = |value: f64| if value > 0.0 { value.min(1.0) as f32 } else { 0.0 };
        Self { step, likeness: share(likeness), adherence: share(adherence) }
    }

    /// The harmonic mean of both shares: a model that has one of them only is worth nothing.
    ///
    /// Assumption: the paper warns that likeness alone rewards overfitting (section 4.1) and weighs neither; here both
    /// weigh the same.
    pub fn score(&self) -> f32 {
        let sum = self.likeness + self.adherence;
        if sum > 0.0 { 2.0 * self.likeness * self.adherence / sum } else { 0.0 }
    }
}

/// The best of `trials`: the highest score, and of equals the latest, which learned most. `None` if there are none.
pub(super) fn best(trials: &[Trial]) -> Option<&Trial> {
    trials.iter().max_by(|a, b| a.score().total_cmp(&b.score()).then(a.step.cmp(&b.step)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_score_is_the_harmonic_mean_and_shares_stay_between_nothing_and_all() {
        let score = |likeness, adherence| Trial::new(1, likeness, adherence).score();
        assert!((score(0.8, 0.4) - 2.0 * 0.8 * 0.4 / 1.2).abs() < 1e-6);
        assert!((score(1.7, 1.0) - 1.0).abs() < 1e-6, "a copy is no better than the photos");
        let nothing = [score(0.9, -0.2), score(0.0, 0.0), score(f64::NAN, 1.0)];
        assert!(nothing.iter().all(|score| score.abs() < 1e-12), "{nothing:?}");
    }

    #[test]
    fn the_best_has_the_highest_score_and_of_equals_it_is_the_latest() {
        let trials = [Trial::new(4, 0.5, 0.9), Trial::new(6, 0.9, 0.8), Trial::new(8, 0.8, 0.9)];
        assert_eq!(best(&trials).map(|trial| trial.step), Some(8), "{trials:?}");
        assert_eq!(best(&trials[..2]).map(|trial| trial.step), Some(6));
        assert_eq!(best(&[]), None);
    }
}
