//! The command line: words in, words and exit codes out. It decides nothing; it wires the rest together.
//!
//! Exit codes: 0 done, 1 the machine failed, 2 the input cannot work.

mod admin;
mod backup;
mod bench;
mod bench_serve;
mod bench_shares;
mod compare;
mod demo;
mod evaluate;
mod export;
mod keys;
mod migrate;
mod models;
mod pair;
mod photos;
mod sample;
mod segment;
mod serve;
mod service;
mod spot;
mod sweep;
mod train;
mod work;

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::config::{self, ConfigError};
use crate::job::{Fault, FaultCode};
use crate::ml;

/// Turns 3-5 photos of a product into a model that draws that product anywhere.
#[derive(Debug, Parser)]
#[command(name = "hypnos", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// See it all: start the service, train on a product that is in the program, draw it.
    Demo(Box<demo::Demo>),
    /// Answer requests; with --workers, do the work as well.
    Serve(Box<serve::Serve>),
    /// Do the work: train and draw what is in the queue.
    Work(Box<work::Work>),
    /// Bring the database up to date.
    Migrate(migrate::Migrate),
    /// Find objects that no row names, and remove them with --remove.
    Sweep(sweep::Sweep),
    /// Copy the SQLite file while the service runs.
    Backup(backup::Backup),
    /// Say that a database and an object store belong together.
    Pair(pair::Pair),
    /// Say who may call.
    #[command(subcommand)]
    Keys(keys::Command),
    /// Look after jobs and tenants, on the database itself.
    #[command(subcommand)]
    Admin(admin::Command),
    /// Print the OpenAPI document of the service.
    Openapi,
    /// Look after the models on disk.
    #[command(subcommand)]
    Models(models::Command),
    /// Find the product in photos, and say whether they can be worked with.
    Segment(segment::Segment),
    /// Make photos of a product into a model of it, without a service.
    Train(Box<train::Train>),
    /// Write a model of a product as what other programs read.
    Export(export::Export),
    /// Draw pictures from a bundle and words.
    Sample(Box<sample::Sample>),
    /// Compare pictures with the photos of a product and with their prompts.
    Evaluate(Box<evaluate::Evaluate>),
    /// Train and judge several methods on several products with equal seeds, and set them side by side.
    Compare(Box<compare::Compare>),
    /// Measure operations and models, side by side with PyTorch where it is given.
    Bench(bench::Args),
    /// Measure the service beside a bare handler, how soon a job starts, and how fast jobs are deleted.
    BenchServe(bench_serve::BenchServe),
    /// Measure what a training keeps of its device beside samples, and how soon one starts.
    BenchShares(bench_shares::BenchShares),
}

/// Why a command ended early, in one line.
#[derive(Debug)]
enum Stop {
    /// The input cannot work.
    Input(String),
    /// The machine failed.
    Failed(String),
    /// Told to stop for the second time.
    AtOnce,
}

impl From<ml::Error> for Stop {
    fn from(error: ml::Error) -> Self {
        match error {
            ml::Error::Tensor(_) => Self::Failed(error.to_string()),
            _ => Self::Input(error.to_string()),
        }
    }
}

impl From<ConfigError> for Stop {
    fn from(wrong: ConfigError) -> Self {
        Self::Input(wrong.to_string())
    }
}

impl From<Fault> for Stop {
    fn from(fault: Fault) -> Self {
        if fault.code == FaultCode::Input { Self::Input(fault.message) } else { Self::Failed(fault.message) }
    }
}

/// Runs what the process's arguments ask for.
pub fn run() -> ExitCode {
    let cli = Cli::from_arg_matches(&command().get_matches()).unwrap_or_else(|error| error.exit());
    let done = check_environment().and_then(|()| match cli.command {
        Command::Demo(args) => demo::run(*args),
        Command::Serve(args) => serve::run(&args),
        Command::Work(args) => work::run(&args),
        Command::Migrate(args) => migrate::run(&args),
        Command::Sweep(args) => sweep::run(&args),
        Command::Backup(args) => backup::run(&args),
        Command::Pair(args) => pair::run(&args),
        Command::Keys(command) => keys::run(&command),
        Command::Admin(command) => admin::run(&command),
        Command::Openapi => {
            say(crate::http::openapi().trim_end());
            Ok(ExitCode::SUCCESS)
        }
        Command::Models(command) => Ok(models::run(command)?),
        Command::Segment(args) => segment::run(&args),
        Command::Train(args) => train::run(&args),
        Command::Export(args) => Ok(export::run(&args)?),
        Command::Sample(args) => Ok(sample::run(&args)?),
        Command::Evaluate(args) => evaluate::run(&args),
        Command::Compare(args) => compare::run(&args),
        Command::Bench(args) => Ok(bench::run(&args)?),
        Command::BenchServe(args) => bench_serve::run(&args),
        Command::BenchShares(args) => bench_shares::run(&args),
    });
    done.unwrap_or_else(|stop| {
        let (line, code) = match stop {
            Stop::Input(line) => (line, 2),
            Stop::Failed(line) => (line, 1),
            Stop::AtOnce => ("told to stop for the second time: stopped at once".into(), 1),
        };
        say_error(&line);
        ExitCode::from(code)
    })
}

/// The whole command line, for those who describe it.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Every setting that the environment may hold.
fn known_variables(command: &clap::Command) -> BTreeSet<String> {
    let own = command.get_arguments().filter_map(|arg| arg.get_env());
    let own = own.map(|name| name.to_string_lossy().into_owned());
    own.chain(command.get_subcommands().flat_map(known_variables)).collect()
}

fn check_environment() -> Result<(), Stop> {
    let names = std::env::vars_os().map(|(name, _)| name.to_string_lossy().into_owned());
    Ok(config::check_environment(names, &known_variables(&command()))?)
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
