//! Phases of a job: their spans, and the time that is left of one.

use std::time::Instant;

use tracing::{Span, info_span};

use crate::clock;
use crate::job::{Phase, Progress};

/// A phase of a job, for traces: the phase lasts as long as the span.
pub(super) fn phase_span(phase: Phase, job: &Span) -> Span {
    info_span!(parent: job, "phase", phase = %phase)
}

/// Estimates the time to the end of the current phase from the pace of its steps.
#[derive(Debug, Default)]
pub(super) struct EtaEstimator {
    /// The phase, when its first step was reported, and which step that was.
    began: Option<(Phase, Instant, u64)>,
}

impl EtaEstimator {
    /// Whether `phase` is the one that the last progress was of.
    pub(super) fn is_in(&self, phase: Phase) -> bool {
        self.began.is_some_and(|(current, ..)| current == phase)
    }

    /// Seconds to the end of the phase, extrapolated from its steps so far; none before there are any.
    pub(super) fn eta(&mut self, progress: &Progress) -> Option<f64> {
        match self.began {
            Some((phase, began, first)) if phase == progress.phase && progress.step > first => {
                let each = clock::since(began).as_secs_f64() / (progress.step - first) as f64;
                Some(each * progress.total.saturating_sub(progress.step) as f64)
            }
            Some((phase, ..)) if phase == progress.phase => None,
            _ => {
                self.began = Some((progress.phase, clock::now(), progress.step));
                None
            }
        }
    }
}
