//! Reads the tensors in PyTorch's pickles (`.pth`, `.pt`, `.bin`), and runs nothing of what is in them.
//!
//! A pickle is a program that builds objects, and Python's own reader calls whatever function such a program names.
//! This reader knows the few names that a dictionary of tensors needs (`machine.rs`) and does itself what they would do.
//! It also passes over a few that published checkpoints have in their trainers' notes, and makes nothing of them; a pickle
//! with any other name is refused by that name. It reads both containers of `torch.save`: the zip archive
//! (`archive.rs`), and the stream that it wrote before PyTorch 1.6 (`stream.rs`), in which LPIPS's heads are published.
//! Format: `torch/serialization.py`, `torch/_weights_only_unpickler.py` and CPython's `pickletools.py`.
//!
//! `candle_core::pickle` does not serve: it knows neither the stream nor strings as Python 2 wrote them, allocates
//! what the length before a string claims (up to 4 GiB), copies a value at each use, so that a few bytes grow without
//! bound, panics on short tuples, and skips tensors that it does not understand.

mod archive;
mod machine;
mod stream;
mod tensor;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use safetensors::Dtype;

use crate::{Error, Result};
use machine::shown;
use tensor::Stored;

/// What a file holds: tensors, and the whole numbers beside them.
type Contents = (BTreeMap<String, Stored>, BTreeMap<String, i64>);

/// Longest pickle that is read, without the tensors' values: those of Stable Diffusion have 0.2 MiB.
const PICKLE_BYTES_MAX: u64 = 16 << 20;

/// An open file of `torch.save`: its pickle is read, its tensors are still on disk.
#[derive(Debug)]
pub struct PickleFile {
    path: PathBuf,
    file: File,
    tensors: BTreeMap<String, Stored>,
    numbers: BTreeMap<String, i64>,
}

impl PickleFile {
    /// Opens a file that holds a dictionary of tensors, or one with such a dictionary as its `state_dict`. Entries that
    /// are no tensors are left out, but for whole numbers at the top. [`Error::File`] if it is something else, is truncated,
    /// names a function or a class that is not known here, or a tensor does not lie within the file.
    pub fn open(path: &Path) -> Result<PickleFile> {
        let bad = |what: String| Error::file(path, what);
        let mut file = File::open(path).map_err(|e| Error::io(path, "cannot be opened", e))?;
        let about = file.metadata().map_err(|e| Error::io(path, "cannot be read", e))?;
        if !about.is_file() {
            return Err(bad("is not a file; a file of torch.save is wanted".into()));
        }
        let mut head = Vec::new();
        (&file).take(8).read_to_end(&mut head).map_err(|e| Error::io(path, "cannot be read", e))?;
        let tensors = match head.as_slice() {
            [b'P', b'K', 3, 4, ..] => archive::read(&file, about.len()),
            [0x80, 2, ..] => stream::read(&mut file, about.len()),
            _ => Err("is no file of torch.save: it begins neither as a zip archive nor as a pickle".into()),
        };
        let (tensors, numbers) = tensors.map_err(bad)?;
        Ok(PickleFile { path: path.to_owned(), file, tensors, numbers })
    }

    /// Where the file lies.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The shape of a tensor, if there is one of that name.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|tensor| tensor.shape.as_slice())
    }

    /// The type of a tensor, if there is one of that name.
    pub fn dtype(&self, name: &str) -> Option<Dtype> {
        self.tensors.get(name).map(|tensor| tensor.dtype)
    }

    /// A whole number at the top of the file, such as the steps that a training took.
    pub fn int(&self, key: &str) -> Option<i64> {
        self.numbers.get(key).copied()
    }

    /// One tensor in f32, row-major, from f64, f32, f16 or bf16. [`Error::File`] for other types, a missing tensor, or a
    /// file that has become unreadable.
    pub fn read(&self, name: &str) -> Result<Vec<f32>> {
        let bad = |what: String| Error::file(&self.path, format!("tensor `{}` {what}", shown(name)));
        self.tensors.get(name).ok_or_else(|| bad("is missing".into()))?.read(&self.file).map_err(bad)
    }
}
