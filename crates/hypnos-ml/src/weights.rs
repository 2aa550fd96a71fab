//! Sources of a model's weights: a file, tensors in memory, a seed, or shapes only ("meta").
//!
//! A model asks for its weights by the names of the diffusers and transformers files; whatever a file calls them
//! otherwise is in one table here. Nothing is remembered of a file but its header: each tensor is read when asked for.
//! Writing is in [`super::tensorfile`].

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Display;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use super::param::Param;
use super::precision::Precision;
use super::random;
use super::tensorfile::TensorFile;
use super::{Error, Result};

pub use super::tensorfile::save;

/// Parts of names that files spell differently: ours (diffusers >= 0.15) and the other.
///
/// The VAE's attention was once a class of its own; the SD 1.5 files still carry its names.
const SPELLINGS: [(&str, &str); 4] =
    [(".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")];

/// Files by transformers < 5 put all of the text encoder under this prefix, newer ones leave it out.
const TEXT_PREFIX: &str = "text_model.";

/// Tensors in files that are no weights: old transformers saved the numbers 0 to 76, torch counts the batches of a
/// norm.
const NO_WEIGHTS: [&str; 2] = ["embeddings.position_ids", "num_batches_tracked"];

/// What files of classifiers hold beyond the trunk that the frozen networks look with: their heads, the last layer of
/// timm's EfficientNet with its norm, and CLIP's temperature.
const HEADS: [&str; 6] = ["fc.", "head.", "classifier.", "conv_head.", "bn2.", "logit_scale"];

/// Standard deviation of random embeddings, the reference's `initializer_range`.
const EMBEDDING_STD: f32 = 0.02;

/// Random values drawn by one thread, and one stream of the generator each; part of what a seed means.
const CHUNK: usize = 1 << 16;

/// A place in the tree of tensor names of one source of weights. Cheap to clone; clones share the source and the
/// list of what was handed out.
#[derive(Clone, Debug)]
pub struct Weights {
    root: Arc<Root>,
    prefix: String,
    trainable: bool,
    precision: Precision,
}

#[derive(Debug)]
struct Root {
    source: Source,
    device: Device,
    given: Mutex<BTreeMap<String, Param>>,
}

#[derive(Debug)]
enum Source {
    File(TensorFile),
    Tensors(HashMap<String, Tensor>),
    Random(u64),
    Meta,
}

impl Weights {
    /// The tensors of a safetensors file; f16, bf16 and f64 become f32 when read. For models that compute in f32, unless
    /// [`Weights::computing_in`] is called; so for the other sources. [`Error::File`] as
    /// [`TensorFile::open`] says.
    pub fn open(file: &Path, device: &Device) -> Result<Weights> {
        Ok(Weights::new(Source::File(TensorFile::open(file)?), device))
    }

    /// Tensors at hand; they become f32 on `device` when asked for, and those that are already are shared, not copied:
    /// a frozen model made from weights in training sees each step of theirs.
    pub fn from_tensors(tensors: HashMap<String, Tensor>, device: &Device) -> Weights {
        Weights::new(Source::Tensors(tensors), device)
    }

    /// Seeded initial weights of any name and shape. Each depends on the seed and its own full name only, never on
    /// the order of asking.
    ///
    /// * biases and running means are 0, other weights of one axis (the norms') 1
    /// * embeddings (`*embedding.weight`) are normal with standard deviation 0.02
    /// * matrices and kernels are normal with standard deviation 1/sqrt(fan-in). In the UNet and the VAE each branch
    ///   begins with a norm and adds a variance of about 1 to its trunk, so activations grow with the root of the
    ///   depth (to about 5 in SD 1.5) and the output, behind the last norm, is of order 1.
    pub fn random(seed: u64, device: &Device) -> Weights {
        Weights::new(Source::Random(seed), device)
    }

    /// No weights at all: [`Weights::get`] notes the name and shape and gives zeros that take no memory. A model
    /// built from it computes nothing, but lists what it would read in [`Weights::params`] and can be run dry.
    pub fn meta() -> Weights {
        Weights::new(Source::Meta, &Device::Cpu)
    }

    fn new(source: Source, device: &Device) -> Weights {
        let root = Root { source, device: device.clone(), given: Mutex::default() };
        let (root, prefix) = (Arc::new(root), String::new());
        Weights { root, prefix, trainable: false, precision: Precision::F32 }
    }

    /// The same place, its weights handed out as trainable or (as they are at first) frozen.
    #[must_use]
    pub fn trainable(self, yes: bool) -> Weights {
        Weights { trainable: yes, ..self }
    }

    /// The same place, for models that compute in `precision`: a weight that does not learn is converted, when it is asked
    /// for, to the dtype that [`Precision`]'s module says.
    #[must_use]
    pub fn computing_in(self, precision: Precision) -> Weights {
        Weights { precision, ..self }
    }

    /// What the models that these are for compute in.
    pub(crate) fn precision(&self) -> Precision {
        self.precision
    }

    /// One level down: `weights.pp("mid_block").pp(0)` is `mid_block.0`.
    #[must_use]
    pub fn pp(&self, name: impl Display) -> Weights {
        Weights { prefix: self.full(&name.to_string()), ..self.clone() }
    }

    /// The weight of this name below this place, on the source's device: in f32 if it is trainable, or else in what it is
    /// held in for the models' precision.
    ///
    /// Asked twice, it is the same weight. `[C, C, 1, 1]` in a file serves where `[C, C]` is wanted and the reverse:
    /// old VAE attention and `proj_in`/`proj_out` come both ways. [`Error::File`] names file, tensor, wanted and found
    /// shape, and for a missing tensor the nearest name there is.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Param> {
        let name = self.full(name);
        if let Some(param) = self.given().get(&name) {
            return self.again(param, shape);
        }
        let param = self.make(&name, shape)?;
        self.given().insert(name, param.clone());
        Ok(param)
    }

    /// All weights handed out so far by this source, by full name.
    pub fn params(&self) -> BTreeMap<String, Param> {
        self.given().clone()
    }

    fn full(&self, name: &str) -> String {
        if self.prefix.is_empty() { name.to_owned() } else { format!("{}.{name}", self.prefix) }
    }

    fn given(&self) -> MutexGuard<'_, BTreeMap<String, Param>> {
        self.root.given.lock().unwrap_or_else(PoisonError::into_inner) // a map is whole after any panic
    }

    /// A weight that was handed out before: it must be wanted as it is.
    fn again(&self, param: &Param, shape: &[usize]) -> Result<Param> {
        let what = if param.value().dims() != shape {
            format!("as {:?} and as {shape:?}", param.value().dims())
        } else if param.is_trainable() != self.trainable && !matches!(self.root.source, Source::Meta) {
            "as trainable and as frozen".to_owned()
        } else {
            return Ok(param.clone());
        };
        Err(self.root.source.error(format!("tensor `{}` is wanted {what}", param.name())))
    }

    fn make(&self, name: &str, shape: &[usize]) -> Result<Param> {
        let device = &self.root.device;
        let dtype = if self.trainable { DType::F32 } else { self.precision.held_in(name, shape) };
        let value = match &self.root.source {
            Source::File(file) => {
                let value = read(file, name, shape)?.to_dtype(dtype)?.to_device(device)?;
                return Ok(Param::owning(name, value, self.trainable)?);
            }
            Source::Tensors(tensors) => {
                let names = tensors.keys().map(String::as_str);
                let found = find(name, shape, |n| tensors.get(n).map(Tensor::dims), names);
                let found = found.map_err(|what| self.root.source.error(what))?;
                tensors[&found].to_dtype(DType::F32)?.to_device(device)?.reshape(shape)?
            }
            Source::Random(seed) => Tensor::from_vec(initial(*seed, name, shape), shape, device)?,
            Source::Meta => return Ok(Param::placeholder(name, shape, dtype, self.trainable)?),
        };
        Ok(Param::new(name, value.to_dtype(dtype)?, self.trainable)?)
    }
}

impl Source {
    /// What is wrong with a tensor of this source.
    fn error(&self, what: String) -> Error {
        match self {
            Self::File(file) => Error::file(file.path(), what),
            Self::Tensors(_) => Error::input(format!("tensors at hand: {what}")),
            Self::Random(seed) => Error::input(format!("random weights of seed {seed}: {what}")),
            Self::Meta => Error::input(format!("shape-only weights: {what}")),
        }
    }
}

/// The weights that a model would read, by name, with their shapes and no values: `load` gets [`Weights::meta`].
pub(crate) fn meta_params<M>(load: impl FnOnce(&Weights) -> Result<M>) -> Result<BTreeMap<String, Param>> {
    let weights = Weights::meta();
    load(&weights)?;
    Ok(weights.params())
}

/// One weight out of a file, in f32 on the CPU, as [`Weights::get`] finds it; nothing is remembered. [`Error::File`] as
/// well for values that are no numbers: whatever is computed with one is none.
pub(crate) fn read(file: &TensorFile, name: &str, shape: &[usize]) -> Result<Tensor> {
    let found = find(name, shape, |n| file.shape(n), file.names());
    let found = found.map_err(|what| Error::file(file.path(), what))?;
    Ok(Tensor::from_vec(file.read_finite(&found)?, shape, &Device::Cpu)?)
}

/// The name under which a source holds the wanted tensor, or why it does not serve.
pub(crate) fn find<'a>(
    name: &str,
    shape: &[usize],
    shape_of: impl Fn(&str) -> Option<&'a [usize]>,
    names: impl Iterator<Item = &'a str>,
) -> Result<String, String> {
    let Some((found, found_shape)) = spellings(name).into_iter().find_map(|n| shape_of(&n).map(|s| (n, s)))
    else {
        return Err(match nearest(name, names) {
            Some(near) => format!("tensor `{name}` of shape {shape:?} is missing (there is `{near}`)"),
            None => format!("tensor `{name}` of shape {shape:?} is missing"),
        });
    };
    if without_kernel(found_shape) == without_kernel(shape) {
        return Ok(found);
    }
    Err(format!("tensor `{found}` has shape {found_shape:?}, but {shape:?} is wanted"))
}

/// The name itself, then what other files may call it.
fn spellings(name: &str) -> Vec<String> {
    let mut all = vec![name.to_owned()];
    for (ours, theirs) in SPELLINGS {
        all.push(name.replace(ours, theirs));
        all.push(name.replace(theirs, ours));
    }
    all.push(name.strip_prefix(TEXT_PREFIX).map_or_else(|| format!("{TEXT_PREFIX}{name}"), str::to_owned));
    all
}

/// `[C, D, 1, 1]`, a kernel of one pixel, is the matrix `[C, D]`.
pub(crate) fn without_kernel(shape: &[usize]) -> &[usize] {
    match shape {
        [_, _, 1, 1] => &shape[..2],
        _ => shape,
    }
}

/// The name most like the wanted one, if it is likely that it is meant.
fn nearest<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let cost = |other: &str| {
        let within = other.ends_with(&format!(".{name}")) || name.ends_with(&format!(".{other}"));
        if within { 0 } else { edits(name, other) }
    };
    let (cost, near) = names.map(|other| (cost(other), other)).min()?;
    (cost <= name.len() / 5).then_some(near)
}

/// Levenshtein's distance between two names, in bytes.
fn edits(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.bytes().enumerate() {
            let change = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// How a file differs from what a model built from a [`Weights::meta`] asked for.
#[derive(Debug, Default)]
pub(crate) struct Differences {
    /// One line for each tensor that is missing or misshapen, without the file's name.
    pub(crate) faults: Vec<String>,
    /// Tensors that the model does not read, but for what is known to be in such files.
    pub(crate) unread: Vec<String>,
    /// Tensors that it reads, as the file names them.
    pub(crate) read: Vec<String>,
}

impl Differences {
    /// Between `file` and the weights that are `wanted`.
    pub(crate) fn new(file: &TensorFile, wanted: &BTreeMap<String, Param>) -> Self {
        let mut all = Self::default();
        for (name, param) in wanted {
            match find(name, param.value().dims(), |n| file.shape(n), file.names()) {
                Ok(found) => all.read.push(found),
                Err(what) => all.faults.push(what),
            }
        }
        let used: BTreeSet<String> = wanted.keys().flat_map(|name| spellings(name)).collect();
        let known = |n: &str| {
            NO_WEIGHTS.iter().any(|no| n.ends_with(no)) || HEADS.iter().any(|head| n.starts_with(head))
        };
        all.unread.extend(file.names().filter(|n| !used.contains(*n) && !known(n)).map(str::to_owned));
        all
    }
}

/// The random initial value of a weight; see [`Weights::random`].
fn initial(seed: u64, name: &str, shape: &[usize]) -> Vec<f32> {
    let n = shape.iter().product();
    let std = match shape {
        _ if name.ends_with("bias") || name.ends_with("running_mean") => return vec![0.; n],
        [] | [_] => return vec![1.; n],
        _ if name.ends_with("embedding.weight") => EMBEDDING_STD,
        [_, inner @ ..] => 1. / (inner.iter().product::<usize>().max(1) as f32).sqrt(),
    };
    let seed = random::derive(seed, name);
    let mut values = vec![0.; n];
    values.par_chunks_mut(CHUNK).enumerate().for_each(|(stream, chunk)| {
        let normal = random::normal(seed, stream as u64, chunk.len());
        chunk.iter_mut().zip(normal).for_each(|(v, z)| *v = z * std);
    });
    values
}
