//! Makes a part of a bundle out of the files that its weights are published in: PyTorch's pickles, or safetensors that
//! hold more than we read.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::configs::read_config;
use super::files::{WEIGHT_FILES, bad, write_json};
use crate::metrics::{self, dino, inception, lpips};
use crate::models::clip::Clip;
use crate::models::tracer::{self, Tracer};
use crate::param::Param;
use crate::perceptual::{self, Perceptual};
use crate::pickle::PickleFile;
use crate::tensorfile::{TensorFile, save_streaming};
use crate::weights::{Weights, find, meta_params};
use crate::{Error, Result};

/// The parts that can be made.
pub const CONVERTIBLE: [&str; 6] =
    ["segmenter", "perceptual", "metrics/dino", "metrics/clip", "metrics/inception", "metrics/lpips"];

/// Writes `part/config.json` and `part/model.safetensors` into `dir`: the tensors that the network of this config
/// reads, in f32, each from the first of `files` that has it. A file is safetensors if its name says so, a pickle
/// otherwise. [`Error::File`] names the file and the tensor if one is missing, has another shape or holds a value that
/// is not finite, and what [`PickleFile::open`] and [`TensorFile::open`] refuse.
pub fn convert(dir: &Path, part: &str, config: &Value, files: &[PathBuf]) -> Result<()> {
    write_json(&dir.join(part).join("config.json"), config)?;
    let wanted = wanted(dir, part)?;
    let files = files.iter().map(|path| Published::open(path)).collect::<Result<Vec<_>>>()?;
    let mut shapes = BTreeMap::new();
    let mut places = BTreeMap::new();
    for (name, param) in wanted {
        places.insert(name.clone(), place(&files, &name, &param.dims())?);
        shapes.insert(name, param.dims());
    }
    let text = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    save_streaming(&dir.join(part).join(WEIGHT_FILES[1]), &shapes, &text, DType::F32, |name| {
        let (file, found) = &places[name];
        let values = files[*file].read(found)?;
        if let Some(value) = values.iter().find(|value| !value.is_finite()) {
            let what = format!("tensor `{found}` holds {value}, which is not finite");
            return Err(bad(files[*file].path(), what));
        }
        Ok(Tensor::from_vec(values, shapes[name].as_slice(), &Device::Cpu)?)
    })
}

/// What the network of a part reads, by its config in `dir`.
fn wanted(dir: &Path, part: &str) -> Result<BTreeMap<String, Param>> {
    let cpu = &Device::Cpu;
    match part {
        "segmenter" => params(dir, part, tracer::Config::check, Tracer::load),
        "perceptual" => {
            params(dir, part, perceptual::Config::check, |w, config| Perceptual::load(w, config, cpu))
        }
        "metrics/dino" => {
            params(dir, part, dino::Config::check, |w, config| dino::Dino::load(w, config, cpu))
        }
        "metrics/clip" => {
            params(dir, part, metrics::clip::Config::check, |w, config| Clip::load(w, &config.net))
        }
        "metrics/inception" => params(dir, part, inception::Config::check, |w, config| {
            inception::Inception::load(w, config, cpu)
        }),
        "metrics/lpips" => {
            params(dir, part, lpips::Config::check, |w, config| lpips::Lpips::load(w, config, cpu))
        }
        _ => Err(Error::input(format!("`{part}` cannot be converted; one of {CONVERTIBLE:?} is wanted"))),
    }
}

fn params<C: DeserializeOwned, M>(
    dir: &Path,
    part: &str,
    check: impl Fn(&C) -> Result<()>,
    load: impl FnOnce(&Weights, &C) -> Result<M>,
) -> Result<BTreeMap<String, Param>> {
    let config = read_config(dir, part, check)?;
    meta_params(|w| load(w, &config))
}

/// The first file with the tensor, by its number, and the name that the tensor has there. The last file says why, if
/// none has it.
fn place(files: &[Published], name: &str, shape: &[usize]) -> Result<(usize, String)> {
    let mut why = Error::input(format!("tensor `{name}` is wanted, but there is no file"));
    for (i, file) in files.iter().enumerate() {
        match file.find(name, shape) {
            Ok(found) => return Ok((i, found)),
            Err(what) => why = bad(file.path(), what),
        }
    }
    Err(why)
}

/// A file with weights as they are published.
enum Published {
    Safetensors(TensorFile),
    Pickle(PickleFile),
}

impl Published {
    fn open(path: &Path) -> Result<Self> {
        let is_safe = path.extension().is_some_and(|extension| extension == "safetensors");
        Ok(if is_safe {
            Self::Safetensors(TensorFile::open(path)?)
        } else {
            Self::Pickle(PickleFile::open(path)?)
        })
    }

    fn path(&self) -> &Path {
        match self {
            Self::Safetensors(file) => file.path(),
            Self::Pickle(file) => file.path(),
        }
    }

    fn find(&self, name: &str, shape: &[usize]) -> Result<String, String> {
        match self {
            Self::Safetensors(file) => find(name, shape, |n| file.shape(n), file.names()),
            Self::Pickle(file) => find(name, shape, |n| file.shape(n), file.names()),
        }
    }

    fn read(&self, name: &str) -> Result<Vec<f32>> {
        match self {
            Self::Safetensors(file) => file.read(name),
            Self::Pickle(file) => file.read(name),
        }
    }
}
