//! `hypnos export`: writes fine-tuned models in formats of other programs.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, ValueEnum};

use super::output::{print_line, print_warning};
use crate::config;
use crate::ml::Result;
use crate::ml::bundle::{Bundle, MINIATURE_NAME};
use crate::ml::export::{FineTune, Form, Width};

#[derive(Debug, Args)]
pub(super) struct Export {
    /// Directory of the models that it was trained from
    #[arg(long, value_name = "DIR", default_value = MINIATURE_NAME, value_parser = config::bundle)]
    bundle: PathBuf,
    /// The fine-tuned weights: `weights.safetensors` of a training
    #[arg(long, value_name = "WEIGHTS")]
    model: PathBuf,
    /// What to write; may be given for each
    #[arg(long = "as", value_enum, value_name = "FORM", required = true)]
    forms: Vec<FormName>,
    /// Directory to put it in; made if it is not there
    #[arg(long)]
    out: PathBuf,
    /// Type of the weights; f16 takes half the room and loses the smaller part of what was learned to rounding
    #[arg(long, value_enum, default_value_t = WidthName::F32)]
    dtype: WidthName,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum FormName {
    /// A directory `diffusers`, which diffusers loads, and which is a bundle
    Diffusers,
    /// `single-file.safetensors`, which AUTOMATIC1111 and ComfyUI read
    SingleFile,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum WidthName {
    F32,
    F16,
}

impl FormName {
    fn form(self) -> Form {
        match self {
            Self::Diffusers => Form::Diffusers,
            Self::SingleFile => Form::SingleFile,
        }
    }

    /// Fails if its place in `dir` is taken.
    pub(super) fn vacant(self, dir: &Path) -> Result<()> {
        self.form().vacant(dir).map(drop)
    }
}

pub(super) fn run(args: &Export) -> Result<ExitCode> {
    write(&args.bundle, &args.model, &args.forms, args.dtype, &args.out)?;
    Ok(ExitCode::SUCCESS)
}

/// Writes the fine-tuned `model` into the directory `out` in each of these formats.
pub(super) fn write(
    bundle: &Path,
    model: &Path,
    forms: &[FormName],
    width: WidthName,
    out: &Path,
) -> Result<()> {
    if forms.is_empty() {
        return Ok(());
    }
    for form in forms {
        form.vacant(out)?;
    }
    let bundle = Bundle::open(bundle)?;
    let fine_tune = FineTune::open(model, &bundle)?;
    let warnings: BTreeSet<String> = forms.iter().flat_map(|form| fine_tune.warnings(form.form())).collect();
    warnings.iter().for_each(|warning| print_warning(warning));
    let width = match width {
        WidthName::F32 => Width::F32,
        WidthName::F16 => Width::F16,
    };
    for form in forms {
        print_line(&fine_tune.export(form.form(), width, out)?.display().to_string());
    }
    Ok(())
}
