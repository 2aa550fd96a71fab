//! The formats that a fine-tune can be exported in.

use std::path::{Path, PathBuf};

use candle_core::DType;

use crate::{Error, Result};

/// What a fine-tune is exported as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportFormat {
    /// `diffusers/`: what `StableDiffusionPipeline.from_pretrained` loads, and a bundle.
    Diffusers,
    /// `single-file.safetensors`: all weights under the names of the original code.
    SingleFile,
}

/// What weights are written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// As they were trained: many of a fine-tune's changes are too small for anything narrower.
    F32,
    /// Half the size. Small changes are lost.
    F16,
}

impl ExportFormat {
    /// What it is called in the directory that it is put in.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Diffusers => "diffusers",
            Self::SingleFile => "single-file.safetensors",
        }
    }

    /// Where it would lie in `dir`. [`Error::File`] if something is there already.
    pub fn vacant(self, dir: &Path) -> Result<PathBuf> {
        let path = dir.join(self.name());
        if path.symlink_metadata().is_ok() {
            return Err(Error::file(&path, "is there already; a new place is wanted"));
        }
        Ok(path)
    }
}

impl Precision {
    pub(super) fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
        }
    }

    /// As configs name it.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
        }
    }
}
