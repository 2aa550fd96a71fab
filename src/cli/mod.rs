//! The command line: parses arguments, connects the other modules, prints results.
//!
//! Exit codes: 0 success, 1 the machine failed, 2 invalid input.

mod admin;
mod backup;
mod bundle;
mod compare;
mod demo;
mod doctor;
mod error;
mod evaluate;
mod export;
mod keys;
mod migrate;
mod models;
mod output;
mod pair;
mod photos;
mod product_detector;
mod sample;
mod segment;
mod serve;
mod service;
mod sweep;
mod train;
mod work;

use std::collections::BTreeSet;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::config;
use error::CliError;
use output::{print_error, print_line};

/// Turns 3-5 photos of a product into a model that draws that product anywhere.
#[derive(Debug, Parser)]
#[command(name = "hypnos", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the whole service locally: train on an embedded product and draw it.
    Demo(Box<demo::Demo>),
    /// Run the HTTP server; with --workers also workers, in the same process.
    Serve(Box<serve::Serve>),
    /// Run workers, which train and draw the queued jobs.
    Work(Box<work::Work>),
    /// Check the machine and the settings, and say what to do where something is wrong.
    Doctor(Box<doctor::Doctor>),
    /// Migrate the database to this program's schema.
    Migrate(migrate::Migrate),
    /// Find objects that no row names, and remove them with --remove.
    Sweep(sweep::Sweep),
    /// Copy the SQLite file while the service runs.
    Backup(backup::Backup),
    /// Mark a database and an object store as one deployment.
    Pair(pair::Pair),
    /// Create, list and revoke API keys.
    #[command(subcommand)]
    Keys(keys::Command),
    /// Administer jobs and tenants, directly on the database.
    #[command(subcommand)]
    Admin(admin::Command),
    /// Print the OpenAPI document of the service.
    Openapi,
    /// Manage model bundles on disk.
    #[command(subcommand)]
    Models(models::Command),
    /// Find the product in photos, and say which photos can be used.
    Segment(segment::Segment),
    /// Train a model on photos of a product, without a service.
    Train(Box<train::Train>),
    /// Export a fine-tuned model in formats of other programs.
    Export(export::Export),
    /// Draw pictures from a bundle and a prompt.
    Sample(Box<sample::Sample>),
    /// Score pictures against the photos of a product and their prompts.
    Evaluate(Box<evaluate::Evaluate>),
    /// Train and evaluate several methods on several products with equal seeds.
    Compare(Box<compare::Compare>),
}

/// Runs the command of the process's arguments.
pub fn run() -> ExitCode {
    let cli = Cli::from_arg_matches(&command().get_matches()).unwrap_or_else(|error| error.exit());
    let done = check_environment().and_then(|()| match cli.command {
        Command::Demo(args) => demo::run(*args),
        Command::Serve(args) => serve::run(&args),
        Command::Work(args) => work::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Migrate(args) => migrate::run(&args),
        Command::Sweep(args) => sweep::run(&args),
        Command::Backup(args) => backup::run(&args),
        Command::Pair(args) => pair::run(&args),
        Command::Keys(command) => keys::run(&command),
        Command::Admin(command) => admin::run(&command),
        Command::Openapi => {
            print_line(crate::http::openapi().trim_end());
            Ok(ExitCode::SUCCESS)
        }
        Command::Models(command) => models::run(command),
        Command::Segment(args) => segment::run(&args),
        Command::Train(args) => train::run(&args),
        Command::Export(args) => Ok(export::run(&args)?),
        Command::Sample(args) => Ok(sample::run(&args)?),
        Command::Evaluate(args) => evaluate::run(&args),
        Command::Compare(args) => compare::run(&args),
    });
    done.unwrap_or_else(|error| {
        let (line, code) = match error {
            CliError::Input(line) => (line, 2),
            CliError::Failed(line) => (line, 1),
            CliError::Interrupted => ("second termination signal: stopped at once".into(), 1),
        };
        print_error(&line);
        ExitCode::from(code)
    })
}

/// The definition of the command line, for documentation.
pub fn command() -> clap::Command {
    Cli::command()
}

/// All environment variables that are settings.
fn known_variables(command: &clap::Command) -> BTreeSet<String> {
    let own = command.get_arguments().filter_map(|arg| arg.get_env());
    let own = own.map(|name| name.to_string_lossy().into_owned());
    own.chain(command.get_subcommands().flat_map(known_variables)).collect()
}

fn check_environment() -> Result<(), CliError> {
    let names = std::env::vars_os().map(|(name, _)| name.to_string_lossy().into_owned());
    Ok(config::check_environment(names, &known_variables(&command()))?)
}
