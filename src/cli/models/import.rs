//! `hypnos models import`: makes a bundle of a checkpoint in one file, or of a directory by diffusers.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};

use super::WEIGHTS_BAR;
use crate::cli::output::{print_line, progress_bar};
use crate::config;
use crate::ml::Result;
use crate::ml::bundle::{Bundle, Import, ImportOptions};
use crate::ml::diffusion::Prediction;

#[derive(Debug, Args)]
pub(in crate::cli) struct ImportArgs {
    /// Checkpoint in one file (.safetensors, .ckpt), or directory saved by diffusers
    path: PathBuf,
    /// Directory of the bundle; new or empty
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Bundle that has what PATH lacks: tokenizer, autoencoder, segmenter, perceptual, metrics
    #[arg(long, value_name = "DIR", value_parser = config::bundle)]
    with: Option<PathBuf>,
    /// Take the moving average (EMA) of the UNet's weights, where the file has both
    #[arg(long)]
    ema: bool,
    /// What the UNet predicts, where PATH does not say
    #[arg(long, value_enum)]
    prediction: Option<PredictionName>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum PredictionName {
    /// Noise, as Stable Diffusion 1.x and the base of 2.x
    Epsilon,
    /// Velocity, as Stable Diffusion 2.x for 768 pixels
    V,
}

pub(in crate::cli) fn run(args: &ImportArgs) -> Result<ExitCode> {
    let options = ImportOptions {
        with: args.with.clone(),
        ema: args.ema,
        prediction: args.prediction.map(|name| match name {
            PredictionName::Epsilon => Prediction::Epsilon,
            PredictionName::V => Prediction::V,
        }),
    };
    let import = Import::open(&args.path, &options)?;
    import.notes().iter().for_each(|note| print_line(note));
    write(&import, &args.out)?;
    let bundle = Bundle::open(&args.out)?;
    let (side, hash) = (bundle.resolution(), bundle.hash()?);
    print_line(&format!("{}: a sound bundle for {side}x{side} pixels, {hash}", args.out.display()));
    Ok(ExitCode::SUCCESS)
}

/// Writes the bundle, with a bar where someone looks.
pub(in crate::cli) fn write(import: &Import, out: &std::path::Path) -> Result<()> {
    let bar = progress_bar(WEIGHTS_BAR, 0);
    let written = import.write(out, &mut |n_done, n_total| {
        bar.set_length(n_total);
        bar.set_position(n_done);
    });
    bar.finish_and_clear();
    written
}
