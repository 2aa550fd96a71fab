//! Tables of numbers, for terminals and for pages.

use maud::{Markup, html};
use serde_json::Value;

use crate::ml::evaluate::METRICS;

/// Rows under a head. The first column names the row.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// Titles of the columns.
    pub head: Vec<String>,
    /// As many cells in each row as there are titles.
    pub rows: Vec<Vec<Cell>>,
}

/// One cell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cell {
    /// What stands in it.
    pub text: String,
    /// Whether it is the best of its column.
    pub best: bool,
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self { text: text.into(), best: false }
    }
}

impl Table {
    /// In Markdown, its columns aligned; the best in bold.
    pub fn markdown(&self) -> String {
        let text = |cell: &Cell| if cell.best { format!("**{}**", cell.text) } else { cell.text.clone() };
        let rows: Vec<Vec<String>> = self.rows.iter().map(|row| row.iter().map(text).collect()).collect();
        let n_chars = |text: &String| text.chars().count();
        let widths: Vec<usize> = (0..self.head.len())
            .map(|i| rows.iter().map(|row| &row[i]).chain([&self.head[i]]).map(n_chars).max().unwrap_or(0))
            .collect();
        let line = |cells: &[String]| {
            let padded = cells.iter().zip(&widths).enumerate().map(|(i, (cell, &width))| {
                if i == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
            });
            format!("| {} |\n", padded.collect::<Vec<_>>().join(" | "))
        };
        let rule = widths.iter().enumerate().map(|(i, &width)| {
            if i == 0 { "-".repeat(width.max(3)) } else { "-".repeat(width.max(2) - 1) + ":" }
        });
        line(&self.head)
            + &format!("| {} |\n", rule.collect::<Vec<_>>().join(" | "))
            + &rows.iter().map(|row| line(row)).collect::<String>()
    }

    pub(super) fn html(&self) -> Markup {
        html! {
            div class="wide" { table {
                thead { tr { @for title in &self.head { th { (title) } } } }
                tbody { @for row in &self.rows { tr { @for cell in row {
                    td class=[cell.best.then_some("best")] { (cell.text) }
                } } } }
            } }
        }
    }
}

/// A number of a report, to four figures; `-` where there is none.
pub(super) fn shown(number: &Value) -> String {
    number["value"].as_f64().map_or_else(|| "-".into(), |value| format!("{value:.4}"))
}

/// An arrow that says which way is better.
fn arrow(number: &Value) -> &'static str {
    match number["better"].as_str() {
        Some("higher") => " ↑",
        Some("lower") => " ↓",
        _ => "",
    }
}

/// What one evaluation found: a row for each metric, a column for each protocol and one for the photos themselves.
pub fn of_evaluation(evaluation: &Value) -> Table {
    let columns = ["prompt_invariant", "prompt_varying", "real"].map(|name| &evaluation[name]);
    let row = |title: &str, numbers: [&Value; 3]| {
        let way = numbers.iter().map(|number| arrow(number)).find(|arrow| !arrow.is_empty());
        let named = Cell::from(format!("{title}{}", way.unwrap_or_default()));
        std::iter::once(named).chain(numbers.map(|number| shown(number).into())).collect()
    };
    let mut rows: Vec<Vec<Cell>> =
        METRICS.iter().map(|(name, title)| row(title, columns.map(|column| &column[name]))).collect();
    rows.push(row("PRES", [&evaluation["pres"], &Value::Null, &Value::Null]));
    rows.push(row("DIV", [&evaluation["div"], &Value::Null, &Value::Null]));
    let head = ["", "prompt-invariant", "prompt-varying", "photos"].map(str::to_owned).to_vec();
    Table { head, rows }
}

/// A method on a subject, and what its evaluation found.
#[derive(Clone, Debug)]
pub struct Found<'a> {
    /// The method.
    pub recipe: &'a str,
    /// The subject.
    pub subject: &'a str,
    /// The `evaluation` of its report; null where there is none yet.
    pub evaluation: &'a Value,
}

/// The paper's table 1 (`prompt_invariant`) or table 2 (`prompt_varying`): a row for each method and subject, methods
/// together; the best of each subject in bold.
pub fn comparison(protocol: &str, all: &[Found<'_>]) -> Table {
    let number = |found: &Found<'_>, metric: &str| found.evaluation[protocol][metric].clone();
    let is_best = |one: &Found<'_>, metric: &str| {
        let own = number(one, metric);
        let Some(value) = own["value"].as_f64() else { return false };
        let lower = own["better"] == "lower";
        let others = all.iter().filter(|other| other.subject == one.subject);
        let mut others = others.filter_map(|other| number(other, metric)["value"].as_f64());
        others.all(|other| if lower { value <= other } else { value >= other })
    };
    let rows = all.iter().map(|found| {
        let metrics = METRICS
            .iter()
            .map(|(metric, _)| Cell { text: shown(&number(found, metric)), best: is_best(found, metric) });
        [found.recipe.into(), found.subject.into()].into_iter().chain(metrics).collect()
    });
    let titles = METRICS.iter().map(|(name, title)| {
        let way =
            all.iter().map(|found| arrow(&found.evaluation[protocol][*name])).find(|way| !way.is_empty());
        format!("{title}{}", way.unwrap_or_default())
    });
    let head = ["method", "subject"].map(str::to_owned).into_iter().chain(titles).collect();
    Table { head, rows: rows.collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn evaluation(dino: f64, lpips: Option<f64>) -> Value {
        json!({"prompt_invariant": {
            "dino": {"value": dino, "better": "higher"}, "lpips": {"value": lpips, "better": "lower"},
        }})
    }

    #[test]
    fn the_best_of_each_subject_is_marked_whichever_way_is_better() {
        let evaluations = [evaluation(0.7, Some(0.4)), evaluation(0.6, Some(0.3)), evaluation(0.1, None)];
        let found = |recipe, subject, i: usize| Found { recipe, subject, evaluation: &evaluations[i] };
        let all = [found("hypnos", "mug", 0), found("dreambooth", "mug", 1), found("hypnos", "car", 2)];
        let table = comparison("prompt_invariant", &all);
        let best = |row: usize, title: &str| {
            let column = table.head.iter().position(|head| head.starts_with(title)).expect("a column");
            table.rows[row][column].best
        };
        assert_eq!([best(0, "DINO"), best(1, "DINO"), best(2, "DINO")], [true, false, true]);
        assert_eq!([best(0, "LPIPS"), best(1, "LPIPS"), best(2, "LPIPS")], [false, true, false]);
        assert!(table.markdown().contains("**0.7000**") && table.markdown().contains("LPIPS ↓"));
    }

    #[test]
    fn a_table_in_markdown_has_as_many_columns_in_every_line() {
        let table = of_evaluation(&evaluation(0.5, None));
        let lines: Vec<String> = table.markdown().lines().map(str::to_owned).collect();
        assert_eq!(lines.len(), 2 + METRICS.len() + 2);
        assert!(lines.iter().all(|line| line.matches('|').count() == 5), "{lines:#?}");
        let widths: Vec<usize> = lines.iter().map(|line| line.chars().count()).collect();
        assert!(widths.iter().all(|width| *width == widths[0]), "{lines:#?}");
        assert!(lines[2].contains("DINO ↑") && lines[2].contains("0.5000") && lines[9].contains(" - "));
    }
}
