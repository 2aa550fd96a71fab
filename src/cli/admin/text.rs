//! Formatting for the terminal: aligned columns, times and ages.

use std::time::Duration;

use jiff::Timestamp;

use crate::cli::output::print_line;

/// Prints rows under a header, each column as wide as its widest cell.
pub(super) fn print_table(head: &[&str], rows: &[Vec<String>]) {
    let widths: Vec<usize> = (0..head.len())
        .map(|i| {
            rows.iter().map(|row| row[i].chars().count()).chain([head[i].chars().count()]).max().unwrap_or(0)
        })
        .collect();
    let line = |cells: Vec<&str>| {
        let padded = cells.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}"));
        print_line(padded.collect::<Vec<_>>().join("  ").trim_end());
    };
    line(head.to_vec());
    for row in rows {
        line(row.iter().map(String::as_str).collect());
    }
}

/// A client's or operator's text in one line, without control characters.
pub(super) fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// A time in RFC 3339.
pub(super) fn time(ms: i64) -> String {
    Timestamp::from_millisecond(ms).map_or_else(|_| ms.to_string(), |time| time.to_string())
}

/// The age of a time, in its largest unit.
pub(super) fn age(ms: i64) -> String {
    let secs = (Timestamp::now().as_millisecond() - ms).max(0) / 1000;
    match secs {
        0..60 => format!("{secs}s"),
        60..3600 => format!("{}m", secs / 60),
        3600..86_400 => format!("{}h", secs / 3600),
        _ => format!("{}d", secs / 86_400),
    }
}

/// A time span such as `90s`, `15m`, `2h` or `7d`.
pub(super) fn span(text: &str) -> Result<Duration, String> {
    let wanted = || format!("wanted a number of s, m, h or d, such as 2h, got {text:?}");
    let unit = text.chars().last().ok_or_else(wanted)?;
    let secs = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86_400,
        _ => return Err(wanted()),
    };
    let number: u64 = text[..text.len() - unit.len_utf8()].parse().map_err(|_| wanted())?;
    number
        .checked_mul(secs)
        .filter(|&secs| secs <= 100 * 365 * 86_400)
        .map(Duration::from_secs)
        .ok_or_else(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_span_is_a_number_and_a_unit() {
        assert_eq!(span("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(span("7d"), Ok(Duration::from_hours(7 * 24)));
        for wrong in ["", "7", "d", "-1h", "1.5h", "7w", "9ä", "99999999999999999999d", "40000d"] {
            assert!(span(wrong).unwrap_err().contains("such as 2h"), "{wrong}");
        }
    }

    #[test]
    fn a_terminal_obeys_nothing_of_a_client_s_text() {
        assert_eq!(plain("mug\u{1b}[2J\nx\u{9b}1m"), "mug\u{fffd}[2J\u{fffd}x\u{fffd}1m");
    }
}
