//! The formats that a fine-tune can be exported in.

use std::path::{Path, PathBuf};

use candle_core::DType;

use crate::{Error, Result};

/// A format of exported fine-tunes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportFormat {
    /// `diffusers/`: what `StableDiffusionPipeline.from_pretrained` loads, and a bundle.
    Diffusers,
    /// `single-file.safetensors`: all weights under the names of the original code.
    SingleFile,
}

/// The type that weights are written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// As they were trained: many of a fine-tune's changes are too small for anything narrower.
    F32,
    /// Half the size. Small changes are lost.
    F16,
}

impl ExportFormat {
    /// Its name in the output directory.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Diffusers => "diffusers",
            Self::SingleFile => "single-file.safetensors",
        }
    }

    /// Its path in `dir`. [`Error::File`] if something exists there already.
    pub fn vacant(self, dir: &Path) -> Result<PathBuf> {
        let path = dir.join(self.name());
        if path.symlink_metadata().is_ok() {
            return Err(Error::file(&path, "already exists; wanted a new path"));
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
