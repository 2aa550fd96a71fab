//! Lines on the terminal.

use std::io::{self, Write};

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

/// Prints an error as one line, even if its text has several.
pub(super) fn print_error(line: &str) {
    let _ = writeln!(io::stderr(), "error: {}", line.lines().collect::<Vec<_>>().join(" "));
}
