//! `hypnos.json`: what we know of a bundle beyond what diffusers says.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::files::{bad, read_text};
use crate::product::Product;
use crate::samplers::Sampler;
use crate::{Error, Result};

/// The sides that pictures may have, in pixels.
pub(super) const RESOLUTIONS: RangeInclusive<usize> = 8..=4096;

/// The content of `hypnos.json`.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Manifest {
    /// What people call it.
    #[serde(default)]
    pub name: String,
    /// Its family: `sd15`, `sd2`, `miniature`.
    #[serde(default)]
    pub kind: String,
    /// Side of the pictures it draws, in pixels; without it the configs decide.
    #[serde(default)]
    pub resolution: Option<usize>,
    /// Words of one token each that mean next to nothing, to be given a meaning.
    #[serde(default)]
    pub rare_tokens: Vec<String>,
    /// For each method, the training options that suit it where the defaults do not: those are for Stable Diffusion
    /// 1.5.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub training: BTreeMap<String, Value>,
    /// How it draws where nothing else is asked for.
    #[serde(default)]
    pub drawing: Drawing,
    /// The classes of things that it can draw; without a list, those whose words its vocabulary has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub classes: Option<Vec<String>>,
    /// What it was fine-tuned to draw, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub product: Option<Product>,
    /// Where each file came from, by its path in the bundle.
    #[serde(default)]
    pub files: BTreeMap<String, Origin>,
    /// The licences that were accepted when files were fetched.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub accepted_licences: BTreeSet<String>,
}

impl Manifest {
    /// The training options that suit it for this method, a JSON object; empty where the defaults do.
    pub fn suited(&self, method: &str) -> Value {
        self.training.get(method).cloned().unwrap_or_else(|| json!({}))
    }
}

/// How a bundle draws where nothing else is asked for.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub struct Drawing {
    /// The way from noise to latents, by its name.
    pub scheduler: Sampler,
    /// Weight of the prompt against the negative prompt.
    pub guidance: f64,
}

impl Default for Drawing {
    /// What suits Stable Diffusion 1.5.
    fn default() -> Self {
        Self { scheduler: Sampler::Dpmpp2m, guidance: 7.5 }
    }
}

/// Where a file came from.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Origin {
    /// A repository, or a sentence.
    pub source: String,
    /// Its commit or version.
    pub revision: String,
    /// SHA-256 of the file, in lower-case hexadecimal.
    pub sha256: String,
    /// SPDX expression.
    pub licence: String,
    /// The files that it was converted from, if it was.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub converted_from: Vec<Fetched>,
}

/// A file as it was fetched.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Fetched {
    /// Its URL, or its repository and path on the hub.
    pub source: String,
    /// The commit or version that was asked for, and behind `@` the commit that it was, where that is another name.
    pub revision: String,
    /// SHA-256 of the file, in lower-case hexadecimal.
    pub sha256: String,
}

/// The `hypnos.json` of the bundle in `dir`, if it has one. [`Error::File`] if that cannot be used.
pub fn read_manifest(dir: &Path) -> Result<Option<Manifest>> {
    let path = dir.join("hypnos.json");
    if !path.exists() {
        return Ok(None);
    }
    let manifest: Manifest =
        serde_json::from_str(&read_text(&path)?).map_err(|e| Error::file_from(&path, e.to_string(), e))?;
    match manifest.resolution {
        Some(side) if !RESOLUTIONS.contains(&side) => {
            let (least, most) = RESOLUTIONS.into_inner();
            Err(bad(&path, format!("resolution is {side}, wanted {least} to {most}")))
        }
        _ => Ok(Some(manifest)),
    }
}
