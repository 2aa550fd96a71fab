//! Lines and progress bars on the terminal.

use std::io::{self, Write};

use indicatif::{ProgressBar, ProgressStyle};

/// Prints a line of output.
pub(super) fn print_line(line: &str) {
    let _ = writeln!(io::stdout(), "{line}"); // a closed pipe is no reason to fail
}

/// Prints what a person may want to know, beside the output.
pub(super) fn print_note(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Prints a warning.
pub(super) fn print_warning(line: &str) {
    let _ = writeln!(io::stderr(), "warning: {line}");
}

/// A progress bar of this template, up to `total`.
pub(super) fn progress_bar(template: &str, total: u64) -> ProgressBar {
    ProgressBar::new(total).with_style(progress_style(template))
}

/// The style of this template; the plain one if the template has a mistake.
pub(super) fn progress_style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// Prints an error as one line, even if its text has several.
pub(super) fn print_error(line: &str) {
    let _ = writeln!(io::stderr(), "error: {}", line.lines().collect::<Vec<_>>().join(" "));
}
