//! Makes a part of a bundle out of the files that its weights are published in: PyTorch's pickles, or safetensors that
//! hold more than we read.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::capabilities::Capability;
use super::configs::read_config;
use super::files::{bad, write_json};
use super::tensors::Tensors;
use crate::metrics::{self, dino, inception, lpips};
use crate::models::clip::Clip;
use crate::models::tracer::{self, Tracer};
use crate::param::Param;
use crate::perceptual::{self, Perceptual};
use crate::tensorfile::{save_streaming, torch_metadata};
use crate::weights::{Weights, meta_params};
use crate::{Error, Result};

/// Writes `part/config.json` and `part/model.safetensors` into `dir`: the tensors that the network of this config
/// reads, in f32, each from the first of `files` that has it: safetensors or pickles. [`Error::File`] names the
/// file if it is neither, and the tensor if one is missing, has another shape or holds a value that is not finite.
pub fn convert(dir: &Path, part: &str, config: &Value, files: &[PathBuf]) -> Result<()> {
    write_json(&dir.join(part).join("config.json"), config)?;
    let shapes = part_shapes(dir, part)?;
    let files = files.iter().map(|path| Tensors::open(path)).collect::<Result<Vec<_>>>()?;
    let mut places = BTreeMap::new();
    for (name, shape) in &shapes {
        places.insert(name.clone(), place(&files, name, shape)?);
    }
    let path = dir.join(part).join("model.safetensors");
    save_streaming(&path, &shapes, &torch_metadata(), DType::F32, |name| {
        let (file, found) = &places[name];
        let values = files[*file].read_finite(found)?;
        Ok(Tensor::from_vec(values, shapes[name].as_slice(), &Device::Cpu)?)
    })
}

/// Names and shapes of the tensors that the network of a part, one of [`Capability::parts`], reads, by its config in
/// `dir`. [`Error::File`] if the config cannot be read.
pub fn part_shapes(dir: &Path, part: &str) -> Result<BTreeMap<String, Vec<usize>>> {
    let Some(capability) = Capability::of_part(part) else {
        let parts = Capability::parts().join(", ");
        return Err(Error::input(format!("`{part}` cannot be converted; one of {parts} is wanted")));
    };
    let params = part_params(dir, capability)?;
    Ok(params.into_iter().map(|(name, param)| (name, param.dims())).collect())
}

/// What the network of a capability's part reads, by its config in `dir`, without values.
pub(super) fn part_params(dir: &Path, capability: Capability) -> Result<BTreeMap<String, Param>> {
    let (cpu, part) = (&Device::Cpu, capability.part());
    match capability {
        Capability::Segmentation => params(dir, part, tracer::Config::check, Tracer::load),
        Capability::PerceptualLoss => {
            params(dir, part, perceptual::Config::check, |w, config| Perceptual::load(w, config, cpu))
        }
        Capability::Dino => {
            params(dir, part, dino::Config::check, |w, config| dino::Dino::load(w, config, cpu))
        }
        Capability::Clip => {
            params(dir, part, metrics::clip::Config::check, |w, config| Clip::load(w, &config.net))
        }
        Capability::Inception => params(dir, part, inception::Config::check, |w, config| {
            inception::Inception::load(w, config, cpu)
        }),
        Capability::Lpips => {
            params(dir, part, lpips::Config::check, |w, config| lpips::Lpips::load(w, config, cpu))
        }
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
fn place(files: &[Tensors], name: &str, shape: &[usize]) -> Result<(usize, String)> {
    let mut why = Error::input(format!("tensor `{name}` is wanted, but there is no file"));
    for (i, file) in files.iter().enumerate() {
        match file.find(name, shape) {
            Ok(found) => return Ok((i, found)),
            Err(what) => why = bad(file.path(), what),
        }
    }
    Err(why)
}
