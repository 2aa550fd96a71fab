//! `hypnos models`: fetches, checks and makes bundles: of what people have, or with random weights; plans what they take.

pub(super) mod import;
pub(super) mod plan;
mod pull;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use candle_core::DType;
use clap::{Args, Subcommand, ValueEnum};

use super::error::CliError;
use super::output::{print_error, print_line, progress_bar};
use crate::ml::Result;
use crate::ml::bundle::{Bundle, Like, check, random, random_metrics, random_part};

/// The progress bar of weights that are written one by one.
const WEIGHTS_BAR: &str = "{bar:40} {human_pos} of {human_len} weights, {eta} left";

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Fetch the published models that HYPNOS needs, and make one bundle of them.
    Pull(Box<pull::Pull>),
    /// List everything that is missing or wrong in a bundle. Reads every weight.
    Check {
        /// Directory of the bundle, in the diffusers layout
        dir: PathBuf,
    },
    /// Convert a checkpoint in one file, or a directory saved by diffusers, to a bundle.
    Import(import::ImportArgs),
    /// Estimate the memory, disk space and time of a training and a sample, and say whether they fit.
    Plan(plan::Plan),
    /// Write a bundle of random weights, for tests and benchmarks.
    Random(Random),
}

#[derive(Debug, Args)]
pub(super) struct Random {
    /// Model whose sizes it has
    #[arg(long, value_enum)]
    like: LikeName,
    /// Seed of the random numbers; the same seed gives the same bytes
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Directory of the bundle; new or empty
    #[arg(long)]
    out: PathBuf,
    /// Add small random networks for the scores, in metrics/
    #[arg(long)]
    metrics: bool,
    /// Add all parts for training and evaluation, in the sizes of `models pull sd15`: 1 GB
    #[arg(long, conflicts_with = "metrics")]
    complete: bool,
    /// Type of the weights in the files
    #[arg(long, value_enum, default_value_t = DTypeName::F32)]
    dtype: DTypeName,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LikeName {
    Sd15,
    Sd2,
    Miniature,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum DTypeName {
    F32,
    F16,
    Bf16,
}

pub(super) fn run(command: Command) -> Result<ExitCode, CliError> {
    match command {
        Command::Pull(pull) => pull::run(&pull),
        Command::Check { dir } => Ok(run_check(&dir)?),
        Command::Import(args) => Ok(import::run(&args)?),
        Command::Plan(args) => plan::run(&args),
        Command::Random(random) => run_random(&random),
    }
}

/// Prints one line for each remark and each problem, and the number of problems or a summary of the bundle.
fn run_check(dir: &Path) -> Result<ExitCode> {
    let report = check(dir);
    for remark in &report.remarks {
        print_line(&format!("remark: {remark}"));
    }
    for error in &report.errors {
        print_error(&error.to_string());
    }
    match report.errors.len() {
        0 => {
            let bundle = Bundle::open(dir)?;
            let (side, hash) = (bundle.resolution(), bundle.hash()?);
            print_line(&format!("{}: a sound bundle for {side}x{side} pixels, {hash}", dir.display()));
            Ok(ExitCode::SUCCESS)
        }
        n => {
            let things = if n == 1 { "thing is" } else { "things are" };
            print_line(&format!("{}: {n} {things} wrong", dir.display()));
            Ok(ExitCode::from(2))
        }
    }
}

fn run_random(args: &Random) -> Result<ExitCode, CliError> {
    let like = match args.like {
        LikeName::Sd15 => Like::Sd15,
        LikeName::Sd2 => Like::Sd2,
        LikeName::Miniature => Like::Miniature,
    };
    let dtype = match args.dtype {
        DTypeName::F32 => DType::F32,
        DTypeName::F16 => DType::F16,
        DTypeName::Bf16 => DType::BF16,
    };
    let bar = progress_bar(WEIGHTS_BAR, 0);
    random(like, args.seed, dtype, &args.out, &mut |n_done, n_total| {
        bar.set_length(n_total);
        bar.set_position(n_done);
    })?;
    bar.finish_and_clear();
    if args.metrics {
        random_metrics(&args.out, args.seed)?;
    }
    if args.complete {
        for (part, config) in pull::published_parts()? {
            random_part(&args.out, &part, &config, args.seed)?;
        }
    }
    print_line(&format!("{}: written", args.out.display()));
    Ok(ExitCode::SUCCESS)
}
