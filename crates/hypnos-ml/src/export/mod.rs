//! A fine-tune as files that other programs read: a directory for diffusers, which is a bundle of ours too, and the
//! single file of AUTOMATIC1111 and ComfyUI.
//!
//! Weights go from where they lie, the fine-tune's file or the bundle's, to where they are wanted one tensor at a time:
//! an export takes the memory of its largest tensor. It appears whole or not at all.

mod diffusers;
mod fine_tune;
mod format;
pub mod ldm_names;
mod single_file;

use std::fs;
use std::path::{Path, PathBuf};

pub use fine_tune::FineTune;
pub use format::{ExportFormat, Precision};

use super::{Error, Result};

impl FineTune<'_> {
    /// Writes it into `dir`, which is made if it is not there, and gives where. [`Error::File`] if something is there
    /// already or cannot be written: then there is as much in `dir` as before.
    pub fn export(&self, format: ExportFormat, precision: Precision, dir: &Path) -> Result<PathBuf> {
        let path = format.vacant(dir)?;
        let made = !dir.exists();
        fs::create_dir_all(dir).map_err(|e| Error::io(dir, "cannot be created", e))?;
        let written = match format {
            ExportFormat::Diffusers => diffusers::write(self, precision, &path),
            ExportFormat::SingleFile => single_file::write(self, precision, &path),
        };
        if written.is_err() && made {
            let _ = fs::remove_dir(dir); // the first error is the one worth telling
        }
        written.map(|()| path)
    }

    /// What may surprise readers of this format.
    pub fn warnings(&self, format: ExportFormat) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.licence().is_none() {
            let what =
                "the bundle does not say what licence its weights come under, so the export does not either";
            warnings.push(what.into());
        }
        if format == ExportFormat::SingleFile && single_file::architecture(self.bundle).is_none() {
            let name = format.name();
            warnings.push(format!(
                "{name}: the bundle does not have the sizes of Stable Diffusion 1 or 2, which readers of this format \
                 expect"
            ));
        }
        warnings
    }
}
