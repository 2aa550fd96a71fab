//! Writes the bundle of an import, whole or not at all.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use serde_json::json;

use super::super::check::check;
use super::super::files::{
    copy, create_directory, hash_file, make_directory, vacant, weight_file, write_json,
};
use super::super::manifest::{Fetched, Origin};
use super::{Content, Converted, Import, Slice, manifest_of, name_of};
use crate::tensorfile::{save_streaming, torch_metadata};
use crate::{Error, Result};

/// What SPDX says where nothing is known.
const NO_LICENCE: &str = "NOASSERTION";

impl Import {
    /// Writes the bundle into `out`, a directory that is new or empty. `progress` is told how many of how many weights
    /// are converted. [`Error::File`] if something is there, a value is not finite, the result is no sound bundle, or
    /// it cannot be written: then there is as much as before.
    pub fn write(&self, out: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
        vacant(out)?;
        make_directory(out, |dir| {
            self.fill(dir, progress)?;
            sound(dir, out)
        })
    }

    fn fill(&self, out: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
        let mut origins = BTreeMap::new();
        for (path, content) in &self.files {
            let place = out.join(path);
            match content {
                Content::Json(value, _) => write_json(&place, value)?,
                Content::Copy { dir, path } => copy(&dir.join(path), &place)?,
            }
            origins.insert(path.clone(), Self::origin(path, content, &place)?);
        }
        let n_total = self.parts.values().flat_map(|part| part.weights.values()).map(n_elements).sum();
        let mut n_done = 0;
        for (part, converted) in &self.parts {
            let path = format!("{part}/{}", weight_file(part));
            self.convert(converted, &out.join(&path), &mut |n| {
                n_done += n;
                progress(n_done, n_total);
            })?;
            origins.insert(path.clone(), self.origin_of_weights(converted, &out.join(&path))?);
        }
        let mut manifest = self.manifest.clone();
        manifest.files = origins;
        write_json(&out.join("hypnos.json"), &json!(manifest))
    }

    /// One part, tensor by tensor, in the type that it has in the source.
    fn convert(&self, part: &Converted, path: &Path, told: &mut dyn FnMut(u64)) -> Result<()> {
        path.parent().map_or(Ok(()), create_directory)?;
        let input = &self.inputs[part.input];
        let shapes = part.weights.iter().map(|(name, slice)| (name.clone(), slice.shape.clone())).collect();
        let width = input.width(part.weights.values().map(|slice| slice.name.as_str()));
        save_streaming(path, &shapes, &torch_metadata(), width, |name| {
            let slice = &part.weights[name];
            let mut values = input.read_finite(&slice.name)?;
            let n = n_elements(slice) as usize;
            if values.len() != n {
                values = values[slice.start..][..n].to_vec();
            }
            told(n as u64);
            Ok(Tensor::from_vec(values, slice.shape.as_slice(), &Device::Cpu)?)
        })
    }

    /// Where a file comes from: what its bundle says of it, if that is still true, or else its bundle.
    fn origin(path: &str, content: &Content, written: &Path) -> Result<Origin> {
        let sha256 = hash_file(written)?;
        let known = match content {
            Content::Copy { dir, path } => {
                manifest_of(dir)?.files.remove(path).filter(|o| o.sha256 == sha256)
            }
            Content::Json(..) => None,
        };
        let source = match content {
            Content::Json(_, from) => from.clone(),
            Content::Copy { dir, .. } => format!("{path} of {}", name_of(dir)),
        };
        let licence = NO_LICENCE.to_owned();
        Ok(known.unwrap_or(Origin {
            source,
            revision: sha256.clone(),
            sha256,
            licence,
            converted_from: Vec::new(),
        }))
    }

    fn origin_of_weights(&self, part: &Converted, written: &Path) -> Result<Origin> {
        let input = &self.inputs[part.input];
        let source = Fetched {
            source: name_of(input.path()),
            revision: String::new(),
            sha256: self.input_hashes()?[part.input].clone(),
        };
        let licence = input.metadata("modelspec.license").unwrap_or(NO_LICENCE).to_owned();
        Ok(Origin {
            source: format!("imported from {} by hypnos", source.source),
            revision: format!("SHA-256 {}", source.sha256),
            sha256: hash_file(written)?,
            licence,
            converted_from: vec![source],
        })
    }
}

/// How many values a weight has.
fn n_elements(slice: &Slice) -> u64 {
    slice.shape.iter().product::<usize>() as u64
}

/// Refuses a bundle in `dir` that is not sound; it will lie in `out`.
fn sound(dir: &Path, out: &Path) -> Result<()> {
    let errors = check(dir).errors;
    let Some(first) = errors.first() else { return Ok(()) };
    let first = first.to_string().replace(&dir.display().to_string(), &out.display().to_string());
    let more = match errors.len() - 1 {
        0 => String::new(),
        n => format!(" ({n} more)"),
    };
    Err(Error::input(format!("the result would not be a sound bundle: {first}{more}")))
}
