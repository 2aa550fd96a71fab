//! Weights in the files that people have, safetensors or pickles, whole or in shards, read alike.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use candle_core::DType;
use safetensors::Dtype;

use crate::pickle::PickleFile;
use crate::tensorfile::{TensorFile, finite, is_index, shards};
use crate::weights::find;
use crate::{Error, Result};

/// Open weights, which are still on disk: of one file, or of several that an index names.
#[derive(Debug)]
pub(super) struct Tensors {
    /// The file, or the index and then its files.
    paths: Vec<PathBuf>,
    files: Files,
}

#[derive(Debug)]
enum Files {
    Safetensors(TensorFile),
    /// At least one.
    Pickles(Vec<PickleFile>),
}

impl Tensors {
    /// Opens a file, or the files of an index (`*.json`); their first bytes say what they are. [`Error::File`] as
    /// [`TensorFile::open`] and [`PickleFile::open`] say.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let shards = if is_index(path) { shards(path)? } else { Vec::new() };
        let holding = if shards.is_empty() { vec![path.to_owned()] } else { shards.clone() };
        let files = if is_pickled(&holding[0])? {
            Files::Pickles(holding.iter().map(|path| PickleFile::open(path)).collect::<Result<_>>()?)
        } else {
            Files::Safetensors(TensorFile::open(path)?)
        };
        Ok(Self { paths: [vec![path.to_owned()], shards].concat(), files })
    }

    /// Where the file lies, or the index of several.
    pub(super) fn path(&self) -> &Path {
        &self.paths[0]
    }

    /// The file, or the index and then its files.
    pub(super) fn paths(&self) -> &[PathBuf] {
        &self.paths
    }

    pub(super) fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        match &self.files {
            Files::Safetensors(file) => Box::new(file.names()),
            Files::Pickles(files) => Box::new(files.iter().flat_map(PickleFile::names)),
        }
    }

    pub(super) fn shape(&self, name: &str) -> Option<&[usize]> {
        match &self.files {
            Files::Safetensors(file) => file.shape(name),
            Files::Pickles(files) => files.iter().find_map(|file| file.shape(name)),
        }
    }

    /// What the file calls a tensor of this name and shape; if it has none, why.
    pub(super) fn find(&self, name: &str, shape: &[usize]) -> Result<String, String> {
        find(name, shape, |name| self.shape(name), self.names())
    }

    /// One tensor in f32, row-major. [`Error::File`] as [`TensorFile::read`] and [`PickleFile::read`] say.
    pub(super) fn read(&self, name: &str) -> Result<Vec<f32>> {
        match &self.files {
            Files::Safetensors(file) => file.read(name),
            Files::Pickles(files) => holding(files, name).read(name),
        }
    }

    /// As [`Tensors::read`] for weights, which have to be numbers.
    pub(super) fn read_finite(&self, name: &str) -> Result<Vec<f32>> {
        match &self.files {
            Files::Safetensors(file) => file.read_finite(name),
            Files::Pickles(files) => {
                let file = holding(files, name);
                finite(file.read(name)?, file.path(), name)
            }
        }
    }

    /// The narrowest type that holds these tensors as they are, of those that weights are saved in.
    pub(super) fn width<'a>(&self, names: impl Iterator<Item = &'a str>) -> DType {
        let dtype = |name| match &self.files {
            Files::Safetensors(file) => file.dtype(name),
            Files::Pickles(files) => files.iter().find_map(|file| file.dtype(name)),
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
    pub(super) fn metadata(&self, key: &str) -> Option<&str> {
        match &self.files {
            Files::Safetensors(file) => file.metadata().get(key).map(String::as_str),
            Files::Pickles(_) => None,
        }
    }

    /// A whole number beside the weights of a pickle.
    pub(super) fn number(&self, key: &str) -> Option<i64> {
        match &self.files {
            Files::Safetensors(_) => None,
            Files::Pickles(files) => files.iter().find_map(|file| file.int(key)),
        }
    }
}

/// The file that holds this tensor; the first if none does.
fn holding<'a>(files: &'a [PickleFile], name: &str) -> &'a PickleFile {
    files.iter().find(|file| file.shape(name).is_some()).unwrap_or(&files[0])
}

/// Whether a file is a pickle, by its first bytes.
fn is_pickled(path: &Path) -> Result<bool> {
    let mut head = Vec::new();
    let file = File::open(path).map_err(|e| Error::io(path, "cannot be opened", e))?;
    file.take(9).read_to_end(&mut head).map_err(|e| Error::io(path, "cannot be read", e))?;
    // A header of safetensors may be of a length that begins as a pickle does.
    let begins = head.starts_with(b"PK\x03\x04") || head.starts_with(b"\x80\x02");
    Ok(begins && head.get(8) != Some(&b'{'))
}
