//! `hypnos doctor`: checks the machine and the settings, each in a line with what to do about it. It prints no secret:
//! addresses of databases and buckets stay out of it.
//!
//! It writes two things at most. The miniature is put into the user's cache if it is the bundle and not there yet, and
//! SQLite may keep its `-wal` and `-shm` files beside a database while that is open.

mod machine;
mod models;
mod service;

use std::process::ExitCode;

use clap::Args;
use serde::Serialize;
use serde_json::json;

use super::error::CliError;
use super::output::print_line;
use crate::config::{Storage, Working};

#[derive(Debug, Args)]
pub(super) struct Doctor {
    #[command(flatten)]
    storage: Storage,
    #[command(flatten)]
    working: Working,
    /// Workers of the process, which share a device's memory; by default, and with 0, one for each device
    #[arg(long, env = "HYPNOS_WORKERS", value_name = "N", value_parser = clap::value_parser!(u16).range(0..=64))]
    workers: Option<u16>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// How a check went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    Ok,
    /// It works, but something may surprise.
    Warning,
    /// It does not work.
    Error,
}

/// A check and what it found.
#[derive(Debug, Serialize)]
struct Finding {
    check: String,
    level: Level,
    /// One line.
    found: String,
    /// What to do.
    advice: Option<String>,
}

impl Finding {
    fn ok(check: impl Into<String>, found: impl Into<String>) -> Self {
        Self { check: check.into(), level: Level::Ok, found: found.into(), advice: None }
    }

    fn warning(check: impl Into<String>, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { level: Level::Warning, advice: Some(advice.into()), ..Self::ok(check, found) }
    }

    fn error(check: impl Into<String>, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { level: Level::Error, advice: Some(advice.into()), ..Self::ok(check, found) }
    }
}

/// Prints what was found. The exit code is 1 if anything does not work. Settings that no worker takes are an error of the
/// input, as they are for `work`.
pub(super) fn run(args: &Doctor) -> Result<ExitCode, CliError> {
    args.working.limits()?;
    let mut findings = machine::check(args);
    findings.extend(models::check(args));
    findings.extend(super::service::run(|_| async { Ok(service::check(&args.storage).await) })?);
    let n_errors = findings.iter().filter(|finding| finding.level == Level::Error).count();
    if args.json {
        print_line(&format!("{:#}", json!({ "ok": n_errors == 0, "checks": findings })));
    } else {
        print(&findings, n_errors);
    }
    Ok(if n_errors == 0 { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

fn print(findings: &[Finding], n_errors: usize) {
    let width = findings.iter().map(|finding| finding.check.len()).max().unwrap_or(0);
    for Finding { check, level, found, advice } in findings {
        let level = match level {
            Level::Ok => "ok",
            Level::Warning => "warning",
            Level::Error => "error",
        };
        print_line(&format!("{level:<9}{check:<width$}  {}", one_line(found)));
        if let Some(advice) = advice {
            print_line(&format!("{:<9}{:<width$}  -> {}", "", "", one_line(advice)));
        }
    }
    print_line(&match n_errors {
        0 => "\nNo errors".to_owned(),
        1 => "\n1 error".to_owned(),
        n => format!("\n{n} errors"),
    });
}

fn one_line(text: &str) -> String {
    text.lines().collect::<Vec<_>>().join(" ")
}
