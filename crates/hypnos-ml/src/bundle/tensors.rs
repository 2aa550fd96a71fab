//! Weights in the files that people have, safetensors or a pickle, read alike.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use candle_core::DType;
use safetensors::Dtype;

use crate::pickle::PickleFile;
use crate::tensorfile::TensorFile;
use crate::weights::find;
use crate::{Error, Result};

/// An open file of weights, which are still on disk.
#[derive(Debug)]
pub(super) enum Tensors {
    Safetensors(TensorFile),
    Pickle(PickleFile),
}

impl Tensors {
    /// Opens a file; its first bytes say what it is. [`Error::File`] as [`TensorFile::open`] and [`PickleFile::open`]
    /// say.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let mut head = Vec::new();
        let file = File::open(path).map_err(|e| Error::io(path, "cannot be opened", e))?;
        file.take(9).read_to_end(&mut head).map_err(|e| Error::io(path, "cannot be read", e))?;
        // A header of safetensors may be of a length that begins as a pickle does.
        let pickled = head.starts_with(b"PK\x03\x04") || head.starts_with(b"\x80\x02");
        if pickled && head.get(8) != Some(&b'{') {
            return Ok(Self::Pickle(PickleFile::open(path)?));
        }
        Ok(Self::Safetensors(TensorFile::open(path)?))
    }

    pub(super) fn path(&self) -> &Path {
        match self {
            Self::Safetensors(file) => file.path(),
            Self::Pickle(file) => file.path(),
        }
    }

    pub(super) fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        match self {
            Self::Safetensors(file) => Box::new(file.names()),
            Self::Pickle(file) => Box::new(file.names()),
        }
    }

    pub(super) fn shape(&self, name: &str) -> Option<&[usize]> {
        match self {
            Self::Safetensors(file) => file.shape(name),
            Self::Pickle(file) => file.shape(name),
        }
    }

    /// What the file calls a tensor of this name and shape; if it has none, why.
    pub(super) fn find(&self, name: &str, shape: &[usize]) -> Result<String, String> {
        find(name, shape, |name| self.shape(name), self.names())
    }

    pub(super) fn read(&self, name: &str) -> Result<Vec<f32>> {
        match self {
            Self::Safetensors(file) => file.read(name),
            Self::Pickle(file) => file.read(name),
        }
    }

    /// The narrowest type that holds these tensors as they are, of those that weights are saved in.
    pub(super) fn width<'a>(&self, names: impl Iterator<Item = &'a str>) -> DType {
        let dtype = |name| match self {
            Self::Safetensors(file) => file.dtype(name),
            Self::Pickle(file) => file.dtype(name),
        };
        let mut dtypes = names.map(dtype);
        match dtypes.next().flatten() {
            Some(first @ (Dtype::F16 | Dtype::BF16)) if dtypes.all(|other| other == Some(first)) => {
                if first == Dtype::F16 { DType::F16 } else { DType::BF16 }
            }
            _ => DType::F32,
        }
    }

    /// A text pair of a safetensors file.
    pub(super) fn said(&self, key: &str) -> Option<&str> {
        match self {
            Self::Safetensors(file) => file.metadata().get(key).map(String::as_str),
            Self::Pickle(_) => None,
        }
    }

    /// A whole number beside the weights of a pickle.
    pub(super) fn number(&self, key: &str) -> Option<i64> {
        match self {
            Self::Safetensors(_) => None,
            Self::Pickle(file) => file.int(key),
        }
    }
}
