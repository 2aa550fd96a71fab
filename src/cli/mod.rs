//! The command line: words in, words and exit codes out. It decides nothing about pictures; [`crate::ml`] does.
//!
//! Exit codes: 0 done, 1 the machine failed, 2 the input cannot work.

mod bench;
mod models;
mod sample;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::ml::Error;

/// Turns 3-5 photos of a product into a model that draws that product anywhere.
#[derive(Debug, Parser)]
#[command(name = "hypnos", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Look after the models on disk.
    #[command(subcommand)]
    Models(models::Command),
    /// Draw pictures from a bundle and words.
    Sample(Box<sample::Sample>),
    /// Measure operations and models, side by side with PyTorch where it is given.
    Bench(bench::Args),
}

/// Runs what the process's arguments ask for.
pub fn run() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Models(command) => models::run(command),
        Command::Sample(args) => sample::run(&args),
        Command::Bench(args) => bench::run(&args),
    };
    done.unwrap_or_else(|error| {
        say_error(&error.to_string());
        match error {
            Error::Bad(_) | Error::Diverged(_) => ExitCode::from(2),
            Error::Tensor(_) => ExitCode::from(1),
        }
    })
}

/// One line for whoever ran the command.
fn say(line: &str) {
    let _ = writeln!(io::stdout(), "{line}"); // a closed pipe is no reason to fail
}

/// One line about something odd that stops nothing.
fn warn(line: &str) {
    let _ = writeln!(io::stderr(), "warning: {line}");
}

/// One line about what went wrong, however many lines its cause has.
fn say_error(line: &str) {
    let _ = writeln!(io::stderr(), "error: {}", line.lines().collect::<Vec<_>>().join(" "));
}
