//! A bundle: one directory with everything that draws pictures, in the Hugging Face diffusers layout.
//!
//! ```text
//! tokenizer/ text_encoder/ unet/ vae/ scheduler/   config.json and safetensors each
//! model_index.json                                 what diffusers says of them; may be missing
//! hypnos.json                                      what we say of them; may be missing
//! segmenter/ perceptual/                           what HYPNOS learns with; may be missing
//! metrics/{dino,clip,inception,lpips}/             what judges the pictures; may be missing
//! ```
//! Any SD 1.x in that layout is one. Sizes, factors and channels come from the configs, never from constants.
//! Opening reads the small files only; weights are read when a part is asked for. Nothing is downloaded or converted.

mod check;
mod embedded;
mod random;
mod random_metrics;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use candle_core::Device;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::adapted::Product;
use super::diffusion::{self, Schedule};
use super::metrics::Backbone;
use super::models::clip::{self, ClipText};
use super::models::tracer::{self, Tracer};
use super::models::unet::{self, Unet};
use super::models::vae::{self, Vae};
use super::param::Param;
use super::perceptual::{self, Perceptual};
use super::samplers::Sampler;
use super::tensorfile::io_words;
use super::tokenizer::Tokenizer;
use super::weights::Weights;
use super::{Error, Result};

use check::blueprint;
pub use check::{Finding, check};
pub use embedded::{MINIATURE_NAME, miniature};
pub use random::{Like, random};
pub(crate) use random::{model_index, weight_file, write_json};
pub use random_metrics::random_metrics;

/// Names of a part's weight file, by preference.
const WEIGHT_FILES: [&str; 6] = [
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "model.fp16.safetensors",
    "diffusion_pytorch_model.bf16.safetensors",
    "model.bf16.safetensors",
];

/// Files with other suffixes that mean weights are there, but not in a form that is read.
const PICKLES: [&str; 4] = ["bin", "ckpt", "pt", "pth"];

/// The small files of a bundle that decide what it draws; the weight files beside them do as well.
const SMALL_FILES: [&str; 9] = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "vae/config.json",
];

/// The parts with weights, and the class that `model_index.json` gives for each.
const PARTS: [(&str, &str); 3] =
    [("text_encoder", "CLIPTextModel"), ("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL")];

/// The parts that only training needs: what it learns with, and what decides which of its steps is served.
const TEACHERS: [&str; 4] = ["segmenter", "perceptual", "metrics/dino", "metrics/clip"];

/// Largest whole number believed in a model's config: a vocabulary has 49,408 entries, a layer 1,280 channels.
const SIZE_MAX: u64 = 1_000_000;

/// Most layers believed; the real text encoder has 12.
const LAYERS_MAX: u64 = 100;

/// Most levels believed; the real UNet has 4.
const LEVELS_MAX: usize = 12;

/// `hypnos.json`: what we know of a bundle beyond what diffusers says.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Manifest {
    /// What people call it.
    #[serde(default)]
    pub name: String,
    /// Its family: `sd15`, `miniature`.
    #[serde(default)]
    pub kind: String,
    /// Side of the pictures it draws, in pixels; without it the configs decide.
    #[serde(default)]
    pub resolution: Option<usize>,
    /// Words of one token each that mean next to nothing, to be given a meaning.
    #[serde(default)]
    pub rare_tokens: Vec<String>,
    /// For each method, the training options that suit it where the defaults do not: those are for Stable Diffusion 1.5.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub training: BTreeMap<String, Value>,
    /// How it draws where nothing else is asked for.
    #[serde(default)]
    pub drawing: Drawing,
    /// What it was fine-tuned to draw, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub product: Option<Product>,
    /// Where each file came from, by its path in the bundle.
    #[serde(default)]
    pub files: BTreeMap<String, Origin>,
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
}

/// An opened bundle.
#[derive(Debug)]
pub struct Bundle {
    dir: PathBuf,
    manifest: Manifest,
    text: clip::Config,
    unet: unet::Config,
    vae: vae::Config,
    schedule: Schedule,
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
    /// Reads the configs of the bundle in `dir`. [`Error::Bad`] is the first thing wrong with them, naming the file;
    /// [`check()`] finds all, in the weights too.
    pub fn open(dir: &Path) -> Result<Bundle> {
        if !dir.is_dir() {
            return Err(Error::Bad(format!("{}: is not a directory; a bundle was wanted", dir.display())));
        }
        check_index(dir)?;
        Ok(Bundle {
            dir: dir.to_owned(),
            manifest: read_manifest(dir)?.unwrap_or_default(),
            text: read_config(dir, "text_encoder", clip::Config::check)?,
            unet: read_config(dir, "unet", unet::Config::check)?,
            vae: read_config(dir, "vae", vae::Config::check)?,
            schedule: read_schedule(dir)?,
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

    /// Side of the pictures it draws, in pixels: what `hypnos.json` says, or the UNet's latents times the VAE's
    /// factor.
    pub fn resolution(&self) -> usize {
        let side = self.unet.sample_size.unwrap_or(64); // diffusers' own fallback for SD 1.x
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

    /// Its tokenizer. [`Error::Bad`] as [`Tokenizer::open`] says.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        Tokenizer::open(&self.dir.join("tokenizer"))
    }

    /// Its text encoder with weights in f32 on `device`, which learn if `trainable`. [`Error::Bad`] names file and
    /// tensor; so for the other two.
    pub fn text_encoder(&self, device: &Device, trainable: bool) -> Result<Part<ClipText>> {
        self.part("text_encoder", device, trainable, |w| ClipText::load(w, &self.text))
    }

    /// Its UNet.
    pub fn unet(&self, device: &Device, trainable: bool) -> Result<Part<Unet>> {
        self.part("unet", device, trainable, |w| Unet::load(w, &self.unet))
    }

    /// Its VAE.
    pub fn vae(&self, device: &Device, trainable: bool) -> Result<Part<Vae>> {
        self.part("vae", device, trainable, |w| Vae::load(w, &self.vae))
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

    /// What finds the product in a photo. [`Error::Bad`] if the bundle has none; so for [`Bundle::perceptual`].
    pub fn segmenter(&self, device: &Device) -> Result<Tracer> {
        let config = self.teacher("segmenter", "finding the product in a photo", tracer::Config::check)?;
        Tracer::load(&self.weights("segmenter", device)?, &config)
    }

    /// What the perceptual loss looks with.
    pub fn perceptual(&self, device: &Device) -> Result<Perceptual> {
        let config = self.teacher("perceptual", "the perceptual loss", perceptual::Config::check)?;
        Perceptual::load(&self.weights("perceptual", device)?, &config, device)
    }

    /// Whether there is a part of this name.
    pub fn has(&self, part: &str) -> bool {
        self.dir.join(part).is_dir()
    }

    /// A backbone in `metrics/`, if the bundle has it: what `load` makes of its weights and its config, what `name` calls
    /// it, and the hash of its weights.
    pub(super) fn backbone<C: DeserializeOwned, M>(
        &self,
        which: &str,
        device: &Device,
        check: impl Fn(&C) -> Result<()>,
        name: impl Fn(&C) -> String,
        load: impl FnOnce(&Weights, &C) -> Result<M>,
    ) -> Result<Option<Backbone<M>>> {
        let part = format!("metrics/{which}");
        if !self.has(&part) {
            return Ok(None);
        }
        let config = read_config(&self.dir, &part, check)?;
        let file = find_weights(&self.dir.join(&part))?;
        let model = load(&Weights::open(&file, device)?, &config)?;
        Ok(Some(Backbone { model, name: name(&config), sha256: hash_file(&file)? }))
    }

    fn teacher<T: DeserializeOwned>(
        &self,
        part: &str,
        what_for: &str,
        check: impl Fn(&T) -> Result<()>,
    ) -> Result<T> {
        if !self.has(part) {
            let what = format!("is missing; {what_for} needs it, though drawing does not");
            return Err(bad(&self.dir.join(part), what));
        }
        read_config(&self.dir, part, check)
    }

    /// Content hash of all that a training learns with: as [`Bundle::hash`], and the parts that only training needs.
    pub fn learning_hash(&self) -> Result<String> {
        let mut all = Sha256::new();
        all.update(self.hash()?);
        for part in TEACHERS.map(|part| self.dir.join(part)).iter().filter(|dir| dir.is_dir()) {
            for file in [part.join("config.json"), find_weights(part)?] {
                all.update(hash_file(&file)?);
            }
        }
        Ok(hex(&all.finalize()))
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
            paths.push(self.weight_file(part)?);
        }
        let mut all = Sha256::new();
        for path in paths {
            all.update(format!("{}\0{}\n", path.display(), hash_file(&self.dir.join(&path))?));
        }
        Ok(self.hash.get_or_init(|| hex(&all.finalize())))
    }

    /// The small files that are there of those that decide what it draws, by their paths in the bundle.
    pub(crate) fn small_files(&self) -> Vec<PathBuf> {
        SMALL_FILES.iter().map(PathBuf::from).filter(|path| self.dir.join(path).exists()).collect()
    }

    /// The weight file of a part, by its path in the bundle.
    pub(crate) fn weight_file(&self, part: &str) -> Result<PathBuf> {
        let file = find_weights(&self.dir.join(part))?;
        Ok(file.strip_prefix(&self.dir).map_or_else(|_| file.clone(), Path::to_owned))
    }

    /// Names and shapes of the weights that a part's model reads, in their current spelling. No weight is read.
    pub(crate) fn shapes(&self, part: &str) -> Result<BTreeMap<String, Vec<usize>>> {
        let params = match part {
            "text_encoder" => blueprint(|w| ClipText::load(w, &self.text))?,
            "unet" => blueprint(|w| Unet::load(w, &self.unet))?,
            "vae" => blueprint(|w| Vae::load(w, &self.vae))?,
            _ => return Err(Error::bad(format!("{part}: is no part that draws"))),
        };
        Ok(params.into_iter().map(|(name, param)| (name, param.dims())).collect())
    }

    /// The configs of text encoder, UNet and VAE.
    pub(crate) fn configs(&self) -> (&clip::Config, &unet::Config, &vae::Config) {
        (&self.text, &self.unet, &self.vae)
    }

    fn part<M>(
        &self,
        name: &str,
        device: &Device,
        trainable: bool,
        load: impl FnOnce(&Weights) -> Result<M>,
    ) -> Result<Part<M>> {
        let weights = self.weights(name, device)?.trainable(trainable);
        Ok(Part { model: load(&weights)?, params: weights.params() })
    }

    fn weights(&self, part: &str, device: &Device) -> Result<Weights> {
        Weights::open(&find_weights(&self.dir.join(part))?, device)
    }
}

/// The weight file of a part; if there is none, what is there instead.
fn find_weights(dir: &Path) -> Result<PathBuf> {
    if let Some(file) = WEIGHT_FILES.iter().map(|name| dir.join(name)).find(|path| path.exists()) {
        return Ok(file);
    }
    let entries = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut names: Vec<PathBuf> = entries.collect();
    names.sort();
    let suffix = |path: &&PathBuf| path.extension().is_some_and(|e| PICKLES.iter().any(|p| e == *p));
    let name = |path: &PathBuf| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let wanted = format!("{}: no weights ({} or {})", dir.display(), WEIGHT_FILES[0], WEIGHT_FILES[1]);
    Err(Error::Bad(if let Some(pickle) = names.iter().find(suffix) {
        format!("{wanted}; there is {}, a pickle: convert it to safetensors", name(pickle))
    } else if let Some(index) = names.iter().find(|path| name(path).ends_with(".safetensors.index.json")) {
        format!("{wanted}; there is {}: join its pieces into one file", name(index))
    } else {
        wanted
    }))
}

/// The text of a file; [`Error::Bad`] if there is none or it is not UTF-8.
fn read_text(path: &Path) -> Result<String> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(text),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Err(bad(path, "is missing")),
        Err(e) => Err(bad(path, format!("cannot be read: {}", io_words(&e)))),
    }
}

/// Any JSON file.
pub(crate) fn read_json(path: &Path) -> Result<Value> {
    serde_json::from_str(&read_text(path)?).map_err(|e| bad(path, format!("is not JSON: {e}")))
}

fn bad(path: &Path, what: impl std::fmt::Display) -> Error {
    Error::Bad(format!("{}: {what}", path.display()))
}

/// What a config's own check said, with the path in place of the bare file name.
fn at(path: &Path, error: Error) -> Error {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    match error {
        Error::Bad(what) => bad(path, what.strip_prefix(&format!("{name}: ")).unwrap_or(&what)),
        other => other,
    }
}

/// A part's `config.json`, checked.
fn read_config<T: DeserializeOwned>(dir: &Path, part: &str, check: impl Fn(&T) -> Result<()>) -> Result<T> {
    let path = dir.join(part).join("config.json");
    believable(&read_json(&path)?).map_err(|what| bad(&path, what))?;
    let config: T = serde_json::from_str(&read_text(&path)?).map_err(|e| bad(&path, e))?;
    check(&config).map_err(|e| at(&path, e))?;
    Ok(config)
}

/// Refuses numbers that no model has, before anything is computed from them.
fn believable(config: &Value) -> Result<(), String> {
    let Some(config) = config.as_object() else { return Err("is not a JSON object".into()) };
    for (key, value) in config {
        if value.is_object() {
            believable(value).map_err(|what| format!("{key}: {what}"))?;
        }
        let one = std::slice::from_ref(value);
        let numbers = value.as_array().map_or(one, Vec::as_slice);
        let layers = key.contains("layers");
        let max = if layers { LAYERS_MAX } else { SIZE_MAX };
        if let Some(n) = numbers.iter().filter_map(Value::as_u64).find(|n| *n > max) {
            return Err(format!("{key} is {n}; at most {max} is believed"));
        }
        if numbers.len() > LEVELS_MAX && key.starts_with("block_") {
            return Err(format!("{key} has {} levels; at most {LEVELS_MAX} are believed", numbers.len()));
        }
    }
    Ok(())
}

fn read_schedule(dir: &Path) -> Result<Schedule> {
    let path = dir.join("scheduler/scheduler_config.json");
    let config = diffusion::Config::parse(&read_text(&path)?).map_err(|e| at(&path, e))?;
    Schedule::new(&config).map_err(|e| at(&path, e))
}

fn read_manifest(dir: &Path) -> Result<Option<Manifest>> {
    let path = dir.join("hypnos.json");
    if !path.exists() {
        return Ok(None);
    }
    let manifest: Manifest = serde_json::from_str(&read_text(&path)?).map_err(|e| bad(&path, e))?;
    match manifest.resolution {
        Some(side) if !(8..=4096).contains(&side) => {
            Err(bad(&path, format!("resolution is {side}, wanted 8 to 4096")))
        }
        _ => Ok(Some(manifest)),
    }
}

/// `model_index.json`, where there is one, has to name the classes that we are.
fn check_index(dir: &Path) -> Result<()> {
    let path = dir.join("model_index.json");
    if !path.exists() {
        return Ok(());
    }
    let index = read_json(&path)?;
    for (part, class) in PARTS.into_iter().chain([("tokenizer", "CLIPTokenizer")]) {
        let found = &index[part][1];
        let fits = found.as_str().is_some_and(|name| name.trim_end_matches("Fast") == class);
        if !found.is_null() && !fits {
            return Err(bad(&path, format!("{part} is {found}, wanted \"{class}\"")));
        }
    }
    Ok(())
}

pub(crate) fn hash_file(path: &Path) -> Result<String> {
    let failed = |e: std::io::Error| bad(path, format!("cannot be read: {}", io_words(&e)));
    let mut file = File::open(path).map_err(failed)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(failed)? {
            0 => return Ok(hex(&hash.finalize())),
            n => hash.update(&buffer[..n]),
        }
    }
}

/// Lower-case hexadecimal, as hashes are written everywhere.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().concat()
}
