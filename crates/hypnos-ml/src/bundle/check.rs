//! Checks a whole bundle and lists everything that is wrong with it, not just the first thing.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::path::{Component, Path};

use super::capabilities::Capability;
use super::configs::{PARTS, check_index, read_config};
use super::convert::part_params;
use super::directory::too_long;
use super::files::{bad, find_weights, hash_file, ignored_weights};
use super::manifest::{Manifest, read_manifest};
use super::rare_tokens::{NO_RARE_TOKENS, rare_tokens};
use super::scheduler::read_schedule;
use crate::models::clip::{self, ClipText};
use crate::models::unet::{self, Unet};
use crate::models::vae::{self, Vae};
use crate::param::Param;
use crate::tensorfile::TensorFile;
use crate::tokenizer::Tokenizer;
use crate::weights::{Differences, meta_params};
use crate::{Error, Result};

/// One thing that was found: the file and what is the matter with it, in one line.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding(String);

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// All that was found in a bundle.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// What keeps it, or a part of it, from being used.
    pub errors: Vec<Finding>,
    /// What does not, and is good to know: parts that are not there, what is not read, settings that are not followed.
    pub remarks: Vec<Finding>,
}

/// Looks through the bundle in `dir` and gives all that is wrong with it; no errors, if it is sound.
///
/// Errors: missing files, bad JSON, settings we cannot honour, tensors that are missing or misshapen, weights that are no
/// numbers, hashes that differ from `hypnos.json`, parts that do not fit one another, rare tokens that are several tokens.
/// Every weight that a model reads is read.
pub fn check(dir: &Path) -> Report {
    let mut found = Findings(Report::default());
    if !dir.is_dir() {
        found.note(Err::<(), _>(bad(dir, "is not a directory; a bundle is wanted")));
        return found.0;
    }
    found.note(check_index(dir));
    let manifest = found.note(read_manifest(dir)).flatten().unwrap_or_default();
    let text = found.note(read_config(dir, "text_encoder", clip::Config::check));
    let unet = found.note(read_config(dir, "unet", unet::Config::check));
    let vae = found.note(read_config(dir, "vae", vae::Config::check));
    if let Some((_, lines)) = found.note(read_schedule(dir, manifest.drawing)) {
        found.0.remarks.extend(lines.into_iter().map(Finding));
    }
    let tokenizer = found.note(Tokenizer::open(&dir.join("tokenizer")));

    let [text_params, unet_params, vae_params] = [
        text.as_ref().and_then(|config| found.note(meta_params(|w| ClipText::load(w, config)))),
        unet.as_ref().and_then(|config| found.note(meta_params(|w| Unet::load(w, config)))),
        vae.as_ref().and_then(|config| found.note(meta_params(|w| Vae::load(w, config)))),
    ];
    for ((part, _), params) in PARTS.into_iter().zip([&text_params, &unet_params, &vae_params]) {
        found.weights(&dir.join(part), params.as_ref());
    }
    found.optional_parts(dir);
    found.fit(dir, text.as_ref(), unet.as_ref(), vae.as_ref(), tokenizer.as_ref());
    found.manifest(dir, &manifest, vae.as_ref(), tokenizer.as_ref());
    found.0
}

struct Findings(Report);

impl Findings {
    /// The value, or none and one more error, unless it was found before: several parts read the same file.
    fn note<T>(&mut self, result: Result<T>) -> Option<T> {
        match result.map_err(|e| Finding(e.to_string())) {
            Ok(value) => Some(value),
            Err(finding) => {
                if !self.0.errors.contains(&finding) {
                    self.0.errors.push(finding);
                }
                None
            }
        }
    }

    fn add(&mut self, error: Error) {
        self.note(Err::<(), _>(error));
    }

    fn remark(&mut self, path: &Path, what: impl std::fmt::Display) {
        self.0.remarks.push(Finding(bad(path, what).to_string()));
    }

    /// The parts that need not be there, and have to be whole if they are.
    fn optional_parts(&mut self, dir: &Path) {
        for capability in Capability::ALL {
            let part = dir.join(capability.part());
            if part.is_dir() {
                let params = self.note(part_params(dir, capability));
                self.weights(&part, params.as_ref());
            } else {
                self.remark(&part, capability.missing());
            }
        }
    }

    /// A part's weight file against what its model would read, if that is known.
    fn weights(&mut self, dir: &Path, wanted: Option<&BTreeMap<String, Param>>) {
        let Some(path) = self.note(find_weights(dir)) else { return };
        if let Some(other) = ignored_weights(dir, &path) {
            let read = path.file_name().unwrap_or_default().display();
            self.remark(&dir.join(other), format!("is not read: the weights are those of {read}"));
        }
        let (Some(file), Some(wanted)) = (self.note(TensorFile::open(&path)), wanted) else { return };
        let Differences { faults, unread, read } = Differences::new(&file, wanted);
        for what in faults {
            self.add(bad(file.path(), what));
        }
        if let Some(what) = self.note(file.faulty_values(read.iter().map(String::as_str))).flatten() {
            self.add(bad(file.path(), what));
        }
        match unread.as_slice() {
            [] => {}
            [one] => self.remark(
                file.path(),
                format!("tensor `{one}` is not read: the model of the config has none such"),
            ),
            [first, ..] => {
                let n = unread.len();
                let what = format!(
                    "{n} tensors are not read: the model of the config has none such; the first is `{first}`"
                );
                self.remark(file.path(), what);
            }
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
        if let (Some(text), Some(unet)) = (text, unet) {
            let (width, of) = (unet.cross_attention_dim, "the text encoder's hidden_size is");
            equal("unet/config.json", "cross_attention_dim", width, of, text.hidden_size);
        }
        if let (Some(unet), Some(vae)) = (unet, vae) {
            let (of, n) = ("the VAE's latents have", vae.latent_channels);
            equal("unet/config.json", "in_channels", unet.in_channels, of, n);
            equal("unet/config.json", "out_channels", unet.out_channels, of, n);
        }
        if let (Some(text), Some(tokenizer)) = (text, tokenizer) {
            let (rows, n_tokens) = (text.vocab_size, tokenizer.vocab_size());
            let (file, what) = (
                dir.join("text_encoder/config.json"),
                format!("vocab_size is {rows}, but the tokenizer has {n_tokens}"),
            );
            if let Some(what) = too_long(tokenizer, text) {
                self.add(bad(&dir.join("tokenizer"), what));
            }
            match rows.cmp(&n_tokens) {
                Ordering::Less => self.add(bad(&file, what)),
                Ordering::Equal => {}
                Ordering::Greater => self.remark(&file, format!("{what}: the last rows are of no token")),
            }
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
        if tokenizer.is_some_and(|tokenizer| rare_tokens(manifest, tokenizer).len() < 2) {
            self.remark(&dir.join("tokenizer"), NO_RARE_TOKENS);
        }
        for (path, origin) in &manifest.files {
            let inside = Path::new(path).components().all(|c| matches!(c, Component::Normal(_)));
            if !inside {
                self.add(bad(&file, format!("lists `{path}`, which is not a path within the bundle")));
            } else if !dir.join(path).exists() {
                self.add(bad(&dir.join(path), "is missing"));
            } else if let Some(hash) = self.note(hash_file(&dir.join(path)))
                && hash != origin.sha256
            {
                let what = format!("has SHA-256 {hash}, but hypnos.json says {}", origin.sha256);
                self.add(bad(&dir.join(path), what));
            }
        }
    }
}
