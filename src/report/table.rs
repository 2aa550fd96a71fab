//! Tables of scores, for terminals and for pages.

use maud::{Markup, html};

use super::scores::{Better, Metric, Protocol, Score, Scores};

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
    /// Its text.
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
    /// The table in Markdown, its columns aligned; the best in bold.
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

/// A score to four decimal places; `-` where there is none.
pub(super) fn formatted(score: Option<&Score>) -> String {
    score.and_then(|score| score.value).map_or_else(|| "-".into(), |value| format!("{value:.4}"))
}

/// An arrow that shows which way is better.
fn arrow(score: &Score) -> &'static str {
    match score.better {
        Better::Higher => " ↑",
        Better::Lower => " ↓",
    }
}

/// The scores of one evaluation: a row for each metric, a column for each protocol and one for the photos themselves.
pub fn scores_table(scores: &Scores) -> Table {
    let row = |title: &str, columns: [Option<&Score>; 3]| -> Vec<Cell> {
        let arrow = columns.into_iter().flatten().next().map_or("", arrow);
        let title = Cell::from(format!("{title}{arrow}"));
        std::iter::once(title).chain(columns.map(|score| formatted(score).into())).collect()
    };
    let protocols = [Protocol::PromptInvariant, Protocol::PromptVarying];
    let metrics = Metric::ALL.into_iter().map(|metric| {
        let [invariant, varying] =
            protocols.map(|protocol| scores.protocol(protocol).map(|of| of.score(metric)));
        row(metric.title(), [invariant, varying, scores.real.score(metric)])
    });
    let of_all = [row("PRES", [Some(&scores.pres), None, None]), row("DIV", [Some(&scores.div), None, None])];
    let head = ["", "prompt-invariant", "prompt-varying", "photos"].map(str::to_owned).to_vec();
    Table { head, rows: metrics.chain(of_all).collect() }
}

/// A method on a subject, and its scores.
#[derive(Clone, Copy, Debug)]
pub struct Evaluated<'a> {
    /// The method.
    pub method: &'a str,
    /// The subject.
    pub subject: &'a str,
    /// Its report's scores; none where nothing was evaluated.
    pub scores: Option<&'a Scores>,
}

impl<'a> Evaluated<'a> {
    fn score(&self, protocol: Protocol, metric: Metric) -> Option<&'a Score> {
        Some(self.scores?.protocol(protocol)?.score(metric))
    }
}

/// The paper's table 1 ([`Protocol::PromptInvariant`]) or table 2 ([`Protocol::PromptVarying`]): a row for each
/// method and subject, methods together; the best of each subject in bold.
pub fn comparison_table(protocol: Protocol, all: &[Evaluated<'_>]) -> Table {
    let is_best = |one: &Evaluated<'_>, metric: Metric| {
        let Some(score) = one.score(protocol, metric) else { return false };
        let Some(value) = score.value else { return false };
        let same_subject = all.iter().filter(|other| other.subject == one.subject);
        let mut others = same_subject.filter_map(|other| other.score(protocol, metric)?.value);
        others.all(|other| match score.better {
            Better::Lower => value <= other,
            Better::Higher => value >= other,
        })
    };
    let rows = all.iter().map(|one| {
        let metrics = Metric::ALL
            .into_iter()
            .map(|metric| Cell { text: formatted(one.score(protocol, metric)), best: is_best(one, metric) });
        [one.method.into(), one.subject.into()].into_iter().chain(metrics).collect()
    });
    let titles = Metric::ALL.into_iter().map(|metric| {
        let arrow = all.iter().find_map(|one| one.score(protocol, metric)).map_or("", arrow);
        format!("{}{arrow}", metric.title())
    });
    let head = ["method", "subject"].map(str::to_owned).into_iter().chain(titles).collect();
    Table { head, rows: rows.collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::scores::example;

    #[test]
    fn the_best_of_each_subject_is_marked_whichever_way_is_better() {
        let scores = [example(Some(0.7), Some(0.4)), example(Some(0.6), Some(0.3)), example(Some(0.1), None)];
        let evaluated = |method, subject, i: usize| Evaluated { method, subject, scores: Some(&scores[i]) };
        let all =
            [evaluated("hypnos", "mug", 0), evaluated("dreambooth", "mug", 1), evaluated("hypnos", "car", 2)];
        let table = comparison_table(Protocol::PromptInvariant, &all);
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
        let table = scores_table(&example(Some(0.5), None));
        let lines: Vec<String> = table.markdown().lines().map(str::to_owned).collect();
        assert_eq!(lines.len(), 2 + Metric::ALL.len() + 2);
        assert!(lines.iter().all(|line| line.matches('|').count() == 5), "{lines:#?}");
        let widths: Vec<usize> = lines.iter().map(|line| line.chars().count()).collect();
        assert!(widths.iter().all(|width| *width == widths[0]), "{lines:#?}");
        assert!(lines[2].contains("DINO ↑") && lines[2].contains("0.5000") && lines[9].contains(" - "));
    }
}
