//! Checks a whole bundle and lists everything that is wrong with it, not just the first thing.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use candle_core::Device;
use serde::de::DeserializeOwned;

use super::configs::{PARTS, check_index, read_config, read_schedule};
use super::files::{bad, find_weights, hash_file};
use super::manifest::{Manifest, read_manifest};
use crate::metrics::{self, dino, inception, lpips};
use crate::models::clip::{self, ClipText};
use crate::models::tracer::{self, Tracer};
use crate::models::unet::{self, Unet};
use crate::models::vae::{self, Vae};
use crate::param::Param;
use crate::perceptual::{self, Perceptual};
use crate::tensorfile::TensorFile;
use crate::tokenizer::Tokenizer;
use crate::weights::{Weights, differences, meta_params};
use crate::{Error, Result};

/// One thing wrong: the file and what is the matter with it, in one line.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding(String);

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Looks through the bundle in `dir` and gives all that is wrong with it; nothing, if it is sound.
///
/// Missing files, bad JSON, settings we cannot honour, tensors that are missing, misshapen or too many, hashes that
/// differ from `hypnos.json`, parts that do not fit one another, rare tokens that are several tokens. Weights are
/// compared by name and shape; their values are not looked at.
pub fn check(dir: &Path) -> Vec<Finding> {
    let mut found = Findings(Vec::new());
    if !dir.is_dir() {
        found.note(Err::<(), _>(bad(dir, "is not a directory; a bundle was wanted")));
        return found.0;
    }
    found.note(check_index(dir));
    let manifest = found.note(read_manifest(dir)).flatten().unwrap_or_default();
    let text = found.note(read_config(dir, "text_encoder", clip::Config::check));
    let unet = found.note(read_config(dir, "unet", unet::Config::check));
    let vae = found.note(read_config(dir, "vae", vae::Config::check));
    found.note(read_schedule(dir));
    let tokenizer = found.note(Tokenizer::open(&dir.join("tokenizer")));

    let [text_params, unet_params, vae_params] = [
        text.as_ref().and_then(|config| found.note(meta_params(|w| ClipText::load(w, config)))),
        unet.as_ref().and_then(|config| found.note(meta_params(|w| Unet::load(w, config)))),
        vae.as_ref().and_then(|config| found.note(meta_params(|w| Vae::load(w, config)))),
    ];
    for ((part, _), params) in PARTS.into_iter().zip([&text_params, &unet_params, &vae_params]) {
        found.weights(&dir.join(part), params.as_ref());
    }
    found.teacher(dir, "segmenter", tracer::Config::check, Tracer::load);
    found.teacher(dir, "perceptual", perceptual::Config::check, |w, config| {
        Perceptual::load(w, config, &Device::Cpu)
    });
    found.teacher(dir, "metrics/dino", dino::Config::check, |w, config| {
        dino::Dino::load(w, config, &Device::Cpu)
    });
    found.teacher(dir, "metrics/clip", metrics::clip::Config::check, |w, config| {
        clip::Clip::load(w, &config.net)
    });
    found.teacher(dir, "metrics/inception", inception::Config::check, |w, config| {
        inception::Inception::load(w, config, &Device::Cpu)
    });
    found.teacher(dir, "metrics/lpips", lpips::Config::check, |w, config| {
        lpips::Lpips::load(w, config, &Device::Cpu)
    });
    found.fit(dir, text.as_ref(), unet.as_ref(), vae.as_ref(), tokenizer.as_ref());
    found.manifest(dir, &manifest, vae.as_ref(), tokenizer.as_ref());
    found.0
}

struct Findings(Vec<Finding>);

impl Findings {
    fn note<T>(&mut self, result: Result<T>) -> Option<T> {
        result.map_err(|e| self.0.push(Finding(e.to_string()))).ok()
    }

    fn add(&mut self, error: Error) {
        self.note(Err::<(), _>(error));
    }

    /// A part that need not be there, but has to be whole if it is.
    fn teacher<C: DeserializeOwned, M>(
        &mut self,
        dir: &Path,
        part: &str,
        check: impl Fn(&C) -> Result<()>,
        load: impl FnOnce(&Weights, &C) -> Result<M>,
    ) {
        if !dir.join(part).is_dir() {
            return;
        }
        let config = self.note(read_config(dir, part, check));
        let params = config.and_then(|config| self.note(meta_params(|w| load(w, &config))));
        self.weights(&dir.join(part), params.as_ref());
    }

    /// A part's weight file against what its model would read, if that is known.
    fn weights(&mut self, dir: &Path, wanted: Option<&BTreeMap<String, Param>>) {
        let file = find_weights(dir).and_then(|path| TensorFile::open(&path));
        let Some(file) = self.note(file) else { return };
        for what in wanted.iter().flat_map(|params| differences(&file, params)) {
            self.add(bad(file.path(), what));
        }
    }

    /// The parts against one another.
    fn fit(
        &mut self,
        dir: &Path,
        text: Option<&clip::Config>,
        unet: Option<&unet::Config>,
        vae: Option<&vae::Config>,
        tokenizer: Option<&Tokenizer>,
    ) {
        let mut equal = |file: &str, key: &str, value: usize, of: &str, wanted: usize| {
            if value != wanted {
                self.add(bad(&dir.join(file), format!("{key} is {value}, but {of} {wanted}")));
            }
        };
        if let (Some(text), Some(tokenizer)) = (text, tokenizer) {
            let vocab_size = tokenizer.vocab_size();
            equal("text_encoder/config.json", "vocab_size", text.vocab_size, "the tokenizer has", vocab_size);
            let positions = text.max_position_embeddings;
            equal("tokenizer", "a text's length", tokenizer.length(), "the text encoder reads", positions);
        }
        if let (Some(text), Some(unet)) = (text, unet) {
            let (width, of) = (unet.cross_attention_dim, "the text encoder's hidden_size is");
            equal("unet/config.json", "cross_attention_dim", width, of, text.hidden_size);
        }
        if let (Some(unet), Some(vae)) = (unet, vae) {
            let (of, n) = ("the VAE's latents have", vae.latent_channels);
            equal("unet/config.json", "in_channels", unet.in_channels, of, n);
            equal("unet/config.json", "out_channels", unet.out_channels, of, n);
        }
    }

    /// What `hypnos.json` promises against what is there.
    fn manifest(
        &mut self,
        dir: &Path,
        manifest: &Manifest,
        vae: Option<&vae::Config>,
        tokenizer: Option<&Tokenizer>,
    ) {
        let file = dir.join("hypnos.json");
        if let (Some(side), Some(factor)) = (manifest.resolution, vae.map(vae::Config::factor))
            && side % factor != 0
        {
            self.add(bad(
                &file,
                format!("resolution is {side}, wanted a multiple of the VAE's factor {factor}"),
            ));
        }
        for word in &manifest.rare_tokens {
            if tokenizer.is_some_and(|tokenizer| !tokenizer.is_single_token(word)) {
                self.add(bad(&file, format!("rare token `{word}` is not a single token of the tokenizer")));
            }
        }
        for (path, origin) in &manifest.files {
            let inside = Path::new(path).components().all(|c| matches!(c, Component::Normal(_)));
            if !inside {
                self.add(bad(&file, format!("lists `{path}`, which is not a path within the bundle")));
            } else if !dir.join(path).exists() {
                let missing = Finding(bad(&dir.join(path), "is missing").to_string());
                if !self.0.contains(&missing) {
                    self.0.push(missing);
                }
            } else if let Some(hash) = self.note(hash_file(&dir.join(path)))
                && hash != origin.sha256
            {
                let what = format!("has SHA-256 {hash}, but hypnos.json says {}", origin.sha256);
                self.add(bad(&dir.join(path), what));
            }
        }
    }
}
