//! Numbers to words: statistics of a case, its row in the Markdown table and its entry in the JSON file.

use serde_json::{Value, json};

use super::cases::Case;
use super::machine::percent;
use super::side_by_side::{Ratios, cells, milliseconds};

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
    let times = if with_torch { cells(ours, theirs) } else { milliseconds(ours) };
    format!("| {name} | {sizes} | {times} | {} |", percent(*others))
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
