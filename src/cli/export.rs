//! `hypnos export`: writes fine-tuned models in formats of other programs.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, ValueEnum};

use super::bundle::BundleArgs;
use super::output::{print_line, print_warning};
use crate::ml::Result;
use crate::ml::bundle::Bundle;
use crate::ml::export::{ExportFormat, FineTune, Precision};

#[derive(Debug, Args)]
pub(super) struct Export {
    #[command(flatten)]
    bundle: BundleArgs,
    /// The fine-tuned weights: `weights.safetensors` of a training
    #[arg(long, value_name = "WEIGHTS")]
    model: PathBuf,
    /// Format to write; may be repeated
    #[arg(long = "as", value_enum, value_name = "FORM", required = true)]
    formats: Vec<FormatName>,
    /// Output directory; created if it does not exist
    #[arg(long)]
    out: PathBuf,
    /// Type of the weights; f16 takes half the space and rounds away the smallest of what was learned
    #[arg(long, value_enum, default_value_t = PrecisionName::F32)]
    dtype: PrecisionName,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum FormatName {
    /// A directory `diffusers`, which diffusers loads, and which is a bundle
    Diffusers,
    /// `single-file.safetensors`, which AUTOMATIC1111 and ComfyUI read
    SingleFile,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum PrecisionName {
    F32,
    F16,
}

impl FormatName {
    fn format(self) -> ExportFormat {
        match self {
            Self::Diffusers => ExportFormat::Diffusers,
            Self::SingleFile => ExportFormat::SingleFile,
        }
    }

    /// Fails if its place in `dir` is taken.
    pub(super) fn vacant(self, dir: &Path) -> Result<()> {
        self.format().vacant(dir).map(drop)
    }
}

pub(super) fn run(args: &Export) -> Result<ExitCode> {
    write(&args.bundle.dir()?, &args.model, &args.formats, args.dtype, &args.out)?;
    Ok(ExitCode::SUCCESS)
}

/// Writes the fine-tuned `model` into the directory `out` in each of these formats.
pub(super) fn write(
    bundle: &Path,
    model: &Path,
    formats: &[FormatName],
    precision: PrecisionName,
    out: &Path,
) -> Result<()> {
    if formats.is_empty() {
        return Ok(());
    }
    for format in formats {
        format.vacant(out)?;
    }
    let bundle = Bundle::open(bundle)?;
    let fine_tune = FineTune::open(model, &bundle)?;
    let warnings: BTreeSet<String> =
        formats.iter().flat_map(|format| fine_tune.warnings(format.format())).collect();
    warnings.iter().for_each(|warning| print_warning(warning));
    let precision = match precision {
        PrecisionName::F32 => Precision::F32,
        PrecisionName::F16 => Precision::F16,
    };
    for format in formats {
        print_line(&fine_tune.export(format.format(), precision, out)?.display().to_string());
    }
    Ok(())
}
