//! Numbers to words: statistics of a case, its row in the Markdown table and its entry in the JSON file.

use serde_json::{Value, json};

use super::cases::Case;

/// What came of a case.
pub(super) enum Outcome {
    Measured(Measured),
    /// It was left out, and why.
    Skipped(String),
}

/// Seconds of each repeat; `theirs` is empty without PyTorch. The i-th of both were taken one after the other.
pub(super) struct Measured {
    pub ours: Vec<f64>,
    pub theirs: Vec<f64>,
    pub how: &'static str,
    /// Share of the machine that other programs took meanwhile, where it is known.
    pub others: Option<f64>,
}

/// Smallest, middle and largest.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Spread {
    min: f64,
    median: f64,
    max: f64,
}

impl Spread {
    fn of(values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |i: usize| sorted.get(i).copied().unwrap_or(f64::NAN);
        let n = sorted.len();
        let median = f64::midpoint(at(n.saturating_sub(1) / 2), at(n / 2));
        Self { min: at(0), median, max: at(n.saturating_sub(1)) }
    }

    /// In milliseconds, three figures or so.
    fn words(self) -> String {
        [self.min, self.median, self.max].map(|seconds| figures(1e3 * seconds)).join(" / ")
    }
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

/// Ours over theirs.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Ratios {
    of_medians: f64,
    median_of_pairs: f64,
    of_fastest: f64,
}

impl Ratios {
    fn of(ours: &[f64], theirs: &[f64]) -> Self {
        let pairs: Vec<f64> = ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs).collect();
        let median_of_pairs = Spread::of(&pairs).median;
        let (ours, theirs) = (Spread::of(ours), Spread::of(theirs));
        Self { of_medians: ours.median / theirs.median, median_of_pairs, of_fastest: ours.min / theirs.min }
    }
}

/// The first two lines of the table.
pub(super) fn head(with_torch: bool) -> [&'static str; 2] {
    if with_torch {
        [
            "| case | sizes | ours, ms | torch, ms | ratio | paired | fastest | others |",
            "|---|---|--:|--:|--:|--:|--:|--:|",
        ]
    } else {
        ["| case | sizes | ours, ms | others |", "|---|---|--:|--:|"]
    }
}

/// One row of the table.
pub(super) fn row(case: &Case, outcome: &Outcome, with_torch: bool) -> String {
    let (name, sizes) = (&case.name, case.work.sizes());
    let Measured { ours, theirs, others, .. } = match outcome {
        Outcome::Measured(measured) => measured,
        Outcome::Skipped(why) => {
            return format!("| {name} | {sizes} | {why} | |{}", if with_torch { " | | | |" } else { "" });
        }
    };
    let others = others.map_or("unknown".into(), |share| format!("{:.0} %", 100.0 * share));
    let our_words = Spread::of(ours).words();
    if !with_torch {
        return format!("| {name} | {sizes} | {our_words} | {others} |");
    }
    let Ratios { of_medians, median_of_pairs, of_fastest } = Ratios::of(ours, theirs);
    let ratios = format!("{of_medians:.2} | {median_of_pairs:.2} | {of_fastest:.2}");
    format!("| {name} | {sizes} | {our_words} | {} | {ratios} | {others} |", Spread::of(theirs).words())
}

/// The same for a program, with every repeat.
pub(super) fn entry(case: &Case, outcome: &Outcome) -> Value {
    let mut entry = json!({"name": case.name, "sizes": case.work.sizes()});
    match outcome {
        Outcome::Measured(Measured { ours, theirs, how, others }) => {
            entry["how"] = json!(how);
            entry["others"] = json!(others);
            entry["ours_s"] = json!(ours);
            if !theirs.is_empty() {
                let ratios = Ratios::of(ours, theirs);
                entry["torch_s"] = json!(theirs);
                entry["ratio"] = json!(ratios.of_medians);
                entry["paired"] = json!(ratios.median_of_pairs);
                entry["fastest"] = json!(ratios.of_fastest);
            }
        }
        Outcome::Skipped(why) => entry["skipped"] = json!(why),
    }
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_lies_between_the_middle_two() {
        assert_eq!(Spread::of(&[4.0, 1.0, 2.0, 8.0]), Spread { min: 1.0, median: 3.0, max: 8.0 });
        assert_eq!(Spread::of(&[4.0, 1.0, 2.0]), Spread { min: 1.0, median: 2.0, max: 4.0 });
        assert_eq!(Spread::of(&[5.0]), Spread { min: 5.0, median: 5.0, max: 5.0 });
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
}
