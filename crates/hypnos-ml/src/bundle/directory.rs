//! An opened bundle: its configs are read, its weights are read when a model is asked for.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use candle_core::Device;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

use super::capabilities::Capability;
use super::configs::{PARTS, check_index, read_config};
use super::files::{SMALL_FILES, all_weights, bad, find_weights, hash_file};
use super::manifest::{Manifest, read_manifest};
use super::scheduler::read_schedule;
use crate::diffusion::Schedule;
use crate::models::clip::{self, ClipText};
use crate::models::tracer::{self, Tracer};
use crate::models::unet::{self, SampleSize, Unet};
use crate::models::vae::{self, Vae};
use crate::param::Param;
use crate::perceptual::{self, Perceptual};
use crate::precision::Precision;
use crate::tokenizer::Tokenizer;
use crate::weights::{Weights, meta_params};
use crate::{Error, Result};

/// The parts that only training needs: what it learns with, and what decides which of its steps is served.
const TRAINING_PARTS: [Capability; 4] =
    [Capability::Segmentation, Capability::PerceptualLoss, Capability::Dino, Capability::Clip];

/// An opened bundle.
#[derive(Debug)]
pub struct Bundle {
    dir: PathBuf,
    manifest: Manifest,
    text: clip::Config,
    unet: unet::Config,
    vae: vae::Config,
    schedule: Schedule,
    warnings: Vec<String>,
    hash: OnceLock<String>,
}

/// A model and its weights by name.
#[derive(Debug)]
pub struct Part<M> {
    /// The model.
    pub model: M,
    /// Every weight it holds; the names are those of the file, in their current spelling.
    pub params: BTreeMap<String, Param>,
}

impl Bundle {
    /// Reads the configs of the bundle in `dir`. [`Error::File`] is the first thing wrong with them, naming the file;
    /// [`check()`](super::check()) finds all, in the weights too.
    pub fn open(dir: &Path) -> Result<Bundle> {
        if !dir.is_dir() {
            return Err(bad(dir, "is not a directory; a bundle is wanted"));
        }
        check_index(dir)?;
        let manifest = read_manifest(dir)?.unwrap_or_default();
        let (schedule, warnings) = read_schedule(dir, manifest.drawing)?;
        Ok(Bundle {
            dir: dir.to_owned(),
            manifest,
            text: read_config(dir, "text_encoder", clip::Config::check)?,
            unet: read_config(dir, "unet", unet::Config::check)?,
            vae: read_config(dir, "vae", vae::Config::check)?,
            schedule,
            warnings,
            hash: OnceLock::new(),
        })
    }

    /// Where it lies.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What `hypnos.json` says; empty if there is none.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// What people call it: what `hypnos.json` says, or the name of its directory.
    pub fn name(&self) -> String {
        if self.manifest.name.is_empty() {
            let dir = self.dir.canonicalize().unwrap_or_else(|_| self.dir.clone());
            dir.file_name().unwrap_or_default().to_string_lossy().into_owned()
        } else {
            self.manifest.name.clone()
        }
    }

    /// Side of the pictures it draws, in pixels: what `hypnos.json` says, or the UNet's latents times the VAE's
    /// factor.
    pub fn resolution(&self) -> usize {
        let side = self.unet.sample_size.map_or(64, SampleSize::side); // diffusers' own fallback for SD 1.x
        self.manifest.resolution.unwrap_or(side * self.factor())
    }

    /// Pixels per latent along each axis, 8 in SD 1.5.
    pub fn factor(&self) -> usize {
        self.vae.factor()
    }

    /// What latents are multiplied with for the UNet, 0.18215 in SD 1.5.
    pub fn scaling_factor(&self) -> f64 {
        self.vae.scaling_factor
    }

    /// Channels of the latents, 4 in SD 1.5.
    pub fn latent_channels(&self) -> usize {
        self.vae.latent_channels
    }

    /// The noise schedule it was trained with.
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// What its files ask for that is not done, and what is done instead: one line each, for whoever runs the program.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Its tokenizer. [`Error::File`] as [`Tokenizer::open`] says, or if it gives tokens or texts for which the text
    /// encoder has no row.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let dir = self.dir.join("tokenizer");
        let tokenizer = Tokenizer::open(&dir)?;
        let (n_tokens, n_rows) = (tokenizer.vocab_size(), self.text.vocab_size);
        if n_tokens > n_rows {
            return Err(bad(&dir, format!("has {n_tokens} tokens; the text encoder has rows for {n_rows}")));
        }
        match too_long(&tokenizer, &self.text) {
            Some(what) => Err(bad(&dir, what)),
            None => Ok(tokenizer),
        }
    }

    /// Its text encoder on `device`, which computes in `precision`, with weights that learn if `trainable`.
    /// [`Error::File`] names file and tensor; so for the other two.
    pub fn text_encoder(
        &self,
        device: &Device,
        precision: Precision,
        trainable: bool,
    ) -> Result<Part<ClipText>> {
        let weights = self.weights("text_encoder", device)?.computing_in(precision);
        part(weights, trainable, |w| ClipText::load(w, &self.text))
    }

    /// Its UNet.
    pub fn unet(&self, device: &Device, precision: Precision, trainable: bool) -> Result<Part<Unet>> {
        let weights = self.weights("unet", device)?.computing_in(precision);
        part(weights, trainable, |w| Unet::load(w, &self.unet))
    }

    /// Its VAE.
    pub fn vae(&self, device: &Device, precision: Precision, trainable: bool) -> Result<Part<Vae>> {
        let weights = self.weights("vae", device)?.computing_in(precision);
        part(weights, trainable, |w| Vae::load(w, &self.vae))
    }

    /// A text encoder of this bundle's shape with weights from elsewhere, named as in the bundle's file; so for
    /// [`Bundle::unet_of`].
    pub fn text_encoder_of(&self, weights: &Weights) -> Result<ClipText> {
        ClipText::load(weights, &self.text)
    }

    /// A UNet of this bundle's shape with weights from elsewhere.
    pub fn unet_of(&self, weights: &Weights) -> Result<Unet> {
        Unet::load(weights, &self.unet)
    }

    /// What finds the product in a photo. [`Error::File`] if the bundle has none; so for [`Bundle::perceptual`].
    pub fn segmenter(&self, device: &Device) -> Result<Tracer> {
        let config = self.training_config(Capability::Segmentation, tracer::Config::check)?;
        Tracer::load(&self.weights(Capability::Segmentation.part(), device)?, &config)
    }

    /// What the perceptual loss looks with.
    pub fn perceptual(&self, device: &Device) -> Result<Perceptual> {
        let config = self.training_config(Capability::PerceptualLoss, perceptual::Config::check)?;
        Perceptual::load(&self.weights(Capability::PerceptualLoss.part(), device)?, &config, device)
    }

    fn training_config<T: DeserializeOwned>(
        &self,
        capability: Capability,
        check: impl Fn(&T) -> Result<()>,
    ) -> Result<T> {
        if !self.can(capability) {
            return Err(bad(&self.dir.join(capability.part()), capability.missing()));
        }
        read_config(&self.dir, capability.part(), check)
    }

    /// Content hash of all that a training learns with: as [`Bundle::hash`], and the parts that only training needs.
    pub fn learning_hash(&self) -> Result<String> {
        let mut all = Sha256::new();
        all.update(self.hash()?);
        for capability in TRAINING_PARTS.into_iter().filter(|capability| self.can(*capability)) {
            let part = &self.dir.join(capability.part());
            for file in [vec![part.join("config.json")], all_weights(part)?].concat() {
                all.update(hash_file(&file)?);
            }
        }
        Ok(format!("{:x}", all.finalize()))
    }

    /// Content hash: SHA-256 over the paths and SHA-256 of all files that decide what it draws, in lower-case
    /// hexadecimal. Two bundles with the same one draw the same, whatever their `hypnos.json` says of them. Reads
    /// every file the first time it is asked for.
    pub fn hash(&self) -> Result<&str> {
        if let Some(hash) = self.hash.get() {
            return Ok(hash);
        }
        let mut paths = self.small_files();
        for (part, _) in PARTS {
            paths.extend(self.weight_files(part)?);
        }
        let mut all = Sha256::new();
        for path in paths {
            all.update(format!("{}\0{}\n", path.display(), hash_file(&self.dir.join(&path))?));
        }
        Ok(self.hash.get_or_init(|| format!("{:x}", all.finalize())))
    }

    /// The small files that are there of those that decide what it draws, by their paths in the bundle.
    pub(crate) fn small_files(&self) -> Vec<PathBuf> {
        SMALL_FILES.iter().map(PathBuf::from).filter(|path| self.dir.join(path).exists()).collect()
    }

    /// The weight file of a part, by its path in the bundle; if there are several, their index and then them.
    pub(crate) fn weight_files(&self, part: &str) -> Result<Vec<PathBuf>> {
        let within =
            |file: PathBuf| file.strip_prefix(&self.dir).map_or_else(|_| file.clone(), Path::to_owned);
        Ok(all_weights(&self.dir.join(part))?.into_iter().map(within).collect())
    }

    /// Names and shapes of the weights that a part's model reads, in their current spelling. No weight is read.
    pub(crate) fn shapes(&self, part: &str) -> Result<BTreeMap<String, Vec<usize>>> {
        let params = match part {
            "text_encoder" => meta_params(|w| ClipText::load(w, &self.text))?,
            "unet" => meta_params(|w| Unet::load(w, &self.unet))?,
            "vae" => meta_params(|w| Vae::load(w, &self.vae))?,
            _ => return Err(Error::input(format!("{part}: is no part that draws"))),
        };
        Ok(params.into_iter().map(|(name, param)| (name, param.dims())).collect())
    }

    /// What this bundle can be used for beyond drawing, by the parts that it has; whether they are sound says
    /// [`check()`](crate::bundle::check()).
    pub fn capabilities(&self) -> Vec<Capability> {
        Capability::ALL.into_iter().filter(|capability| self.can(*capability)).collect()
    }

    /// What it cannot be used for; [`Capability::missing`] says why.
    pub fn missing(&self) -> Vec<Capability> {
        Capability::ALL.into_iter().filter(|capability| !self.can(*capability)).collect()
    }

    /// Whether it has the part that this takes.
    pub fn can(&self, capability: Capability) -> bool {
        self.dir.join(capability.part()).is_dir()
    }

    /// The configs of text encoder, UNet and VAE.
    pub(crate) fn configs(&self) -> (&clip::Config, &unet::Config, &vae::Config) {
        (&self.text, &self.unet, &self.vae)
    }

    fn weights(&self, part: &str, device: &Device) -> Result<Weights> {
        Weights::open(&find_weights(&self.dir.join(part))?, device)
    }
}

/// A model and its weights.
pub(super) fn part<M>(
    weights: Weights,
    trainable: bool,
    load: impl FnOnce(&Weights) -> Result<M>,
) -> Result<Part<M>> {
    let weights = weights.trainable(trainable);
    Ok(Part { model: load(&weights)?, params: weights.params() })
}

/// What is wrong with a tokenizer whose texts are longer than the text encoder can read.
pub(super) fn too_long(tokenizer: &Tokenizer, text: &clip::Config) -> Option<String> {
    let (length, places) = (tokenizer.length(), text.max_position_embeddings);
    (length > places)
        .then(|| format!("gives texts of {length} tokens; the text encoder has places for {places}"))
}
