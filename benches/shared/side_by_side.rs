//! Ours and another implementation side by side: both measured in turns, and their times compared.

use std::time::Duration;

use hypnos::ml::Result;

use super::spread::Spread;

/// Idle time before each measurement.
const QUIET: Duration = Duration::from_millis(50);

/// A measurement lasts at least this long, by repetition.
const SHORTEST_SECS: f64 = 0.05;

/// Runs of one measurement at most.
const MOST_RUNS: f64 = 1000.0;

/// Warms both sides up, then measures ours, theirs, ours, theirs, until each has `repeats` measurements. A side is
/// given a number of runs and returns the mean seconds of one; so are the results, the i-th of both neighbours in time.
pub(crate) fn in_turns(
    mut ours: impl FnMut(usize) -> Result<f64>,
    mut theirs: impl FnMut(usize) -> Result<f64>,
    repeats: usize,
) -> Result<(Vec<f64>, Vec<f64>)> {
    let n_runs = n_runs(warm_up(&mut ours)?.min(warm_up(&mut theirs)?));
    let (mut our_seconds, mut their_seconds) = (Vec::new(), Vec::new());
    for _ in 0..repeats {
        our_seconds.push(quietly(|| ours(n_runs))?);
        their_seconds.push(quietly(|| theirs(n_runs))?);
    }
    Ok((our_seconds, their_seconds))
}

pub(crate) fn quietly(measure: impl FnOnce() -> Result<f64>) -> Result<f64> {
    std::thread::sleep(QUIET);
    measure()
}

/// Seconds of a run that is not the first.
pub(crate) fn warm_up(mut measure: impl FnMut(usize) -> Result<f64>) -> Result<f64> {
    let first = measure(1)?;
    if first < SHORTEST_SECS { measure(1) } else { Ok(first) }
}

/// Runs that make one measurement, where one run takes `seconds`.
pub(crate) fn n_runs(seconds: f64) -> usize {
    (SHORTEST_SECS / seconds.max(1e-9)).ceil().clamp(1.0, MOST_RUNS) as usize
}

/// Ours over theirs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Ratios {
    pub(crate) of_medians: f64,
    pub(crate) median_of_pairs: f64,
    pub(crate) of_fastest: f64,
}

impl Ratios {
    pub(crate) fn of(ours: &[f64], theirs: &[f64]) -> Self {
        let pairs: Vec<f64> = ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs).collect();
        let median_of_pairs = Spread::of(&pairs).median;
        let (ours, theirs) = (Spread::of(ours), Spread::of(theirs));
        Self { of_medians: ours.median / theirs.median, median_of_pairs, of_fastest: ours.min / theirs.min }
    }
}

/// Five cells of a Markdown table: our times, theirs, and the ratios `ratio`, `paired` and `fastest`.
pub(crate) fn cells(ours: &[f64], theirs: &[f64]) -> String {
    let Ratios { of_medians, median_of_pairs, of_fastest } = Ratios::of(ours, theirs);
    let times = format!("{} | {}", milliseconds(ours), milliseconds(theirs));
    format!("{times} | {of_medians:.2} | {median_of_pairs:.2} | {of_fastest:.2}")
}

/// Smallest, median and largest of seconds, as milliseconds of three figures or so.
pub(crate) fn milliseconds(seconds: &[f64]) -> String {
    let Spread { min, median, max } = Spread::of(seconds);
    [min, median, max].map(|seconds| figures(1e3 * seconds)).join(" / ")
}

fn figures(x: f64) -> String {
    let n_decimals = match x {
        _ if x < 1.0 => 3,
        _ if x < 10.0 => 2,
        _ if x < 100.0 => 1,
        _ => 0,
    };
    format!("{x:.n_decimals$}")
}

#[test]
fn every_ratio_is_ours_over_theirs() {
    // Medians 3 and 2; pairs 1/2, 3/4 and 10/2; fastest 1 and 2.
    let wanted = Ratios { of_medians: 1.5, median_of_pairs: 0.75, of_fastest: 0.5 };
    assert_eq!(Ratios::of(&[1.0, 3.0, 10.0], &[2.0, 4.0, 2.0]), wanted);
}

#[test]
fn times_have_three_figures_or_so() {
    let written = [0.0123, 1.234, 12.34, 1234.5].map(figures);
    assert_eq!(written, ["0.012", "1.23", "12.3", "1234"]);
}
