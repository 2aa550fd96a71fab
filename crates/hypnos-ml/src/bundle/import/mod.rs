//! Makes a bundle of what people have: a checkpoint in one file, by the names of the original code, or a directory by
//! diffusers that is no bundle yet. What it lacks comes from another bundle.
//!
//! [`Import::open`] reads headers and small files and decides everything; [`Import::write`] converts one tensor at a
//! time, checks the result, and gives it its name when it is whole.

mod directory;
mod refusal;
mod single_file;
mod write;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::capabilities::Capability;
use super::files::{all_weights, bad, hash_file, hash_files, read_json};
use super::manifest::{Manifest, read_manifest};
use super::rare_tokens::rare_tokens;
use super::tensors::Tensors;
use crate::Result;
use crate::diffusion::Prediction;
use crate::tokenizer::Tokenizer;

/// Part of the key of an import: another number where the same files become another bundle.
const VERSION: &str = "import 2";

/// The files of a tokenizer, whichever of them are there.
const TOKENIZER_FILES: [&str; 6] = [
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
];

/// What helps where nobody has a tokenizer.
const WITH_TOKENIZER: &str =
    "--with names a bundle that has one, such as that of `hypnos models pull sd15 --only tokenizer`";

/// What is asked of an import beside its source.
#[derive(Clone, Debug, Default)]
pub struct ImportOptions {
    /// A bundle that has what the source lacks: tokenizer, autoencoder, segmenter, perceptual, metrics.
    pub with: Option<PathBuf>,
    /// Whether the UNet is the moving average of a training's weights, where a file has both.
    pub ema: bool,
    /// What the UNet predicts, where the source does not say.
    pub prediction: Option<Prediction>,
}

/// A source that was understood, and of what the bundle will be made.
#[derive(Debug)]
pub struct Import {
    source: PathBuf,
    /// What is read of the source, each once.
    inputs: Vec<Tensors>,
    parts: BTreeMap<&'static str, Converted>,
    files: BTreeMap<String, Content>,
    manifest: Manifest,
    notes: Vec<String>,
    input_hashes: OnceLock<Vec<String>>,
}

/// A part whose weights are written anew.
#[derive(Debug)]
struct Converted {
    /// Which of the inputs has them.
    input: usize,
    /// Where each lies, by the name that it gets.
    weights: BTreeMap<String, Slice>,
}

/// Where a weight lies in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Slice {
    /// The tensor that it is, or a part of.
    name: String,
    /// Its first element there.
    start: usize,
    /// Its own shape.
    shape: Vec<usize>,
}

/// A file that is written as it is.
#[derive(Clone, Debug)]
enum Content {
    /// Settings, and where they come from.
    Json(Value, String),
    /// A copy of `path` of a bundle or a directory.
    Copy { dir: PathBuf, path: String },
}

impl Import {
    /// Opens a file or a directory. [`Error::File`](crate::Error::File) if it is something else than Stable Diffusion
    /// 1.x or 2.x, a tensor is missing or misshapen, or nobody has the tokenizer or another part that it lacks.
    pub fn open(source: &Path, options: &ImportOptions) -> Result<Import> {
        if let Some(with) = options.with.as_ref().filter(|with| !with.is_dir()) {
            return Err(bad(with, "is not a directory; a bundle is wanted for what is missing"));
        }
        if source.is_dir() { directory::open(source, options) } else { single_file::open(source, options) }
    }

    /// What was found and decided, in lines for a person.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Tells this import from every other: SHA-256, in lower-case hexadecimal, of all that the bundle is made of. Reads
    /// every file.
    pub fn key(&self) -> Result<String> {
        let mut all = Sha256::new();
        all.update(VERSION);
        for hash in self.input_hashes()? {
            all.update(format!("\0{hash}"));
        }
        for (part, converted) in &self.parts {
            let slices = converted.weights.iter().map(|(name, slice)| format!("{name} {slice:?}"));
            all.update(format!("\0{part} {} {}", converted.input, slices.collect::<Vec<_>>().join("\n")));
        }
        for (path, content) in &self.files {
            let content = match content {
                Content::Json(value, _) => value.to_string(),
                Content::Copy { dir, path } => hash_file(&dir.join(path))?,
            };
            all.update(format!("\0{path} {content}"));
        }
        all.update(format!("\0{}", json!(self.manifest)));
        Ok(format!("{:x}", all.finalize()))
    }

    /// Where the bundle of this import lies beneath `cache`, if it was made, and where it is to be made. Reads every
    /// file.
    pub fn place(&self, cache: &Path) -> Result<PathBuf> {
        let name = stem_of(&self.source);
        Ok(cache.join("bundles").join(format!("{name}-{}", &self.key()?[..12])))
    }

    /// SHA-256 of the source's files.
    fn input_hashes(&self) -> Result<&[String]> {
        if let Some(hashes) = self.input_hashes.get() {
            return Ok(hashes);
        }
        let hashes = self.inputs.iter().map(|input| hash_files(input.paths())).collect::<Result<_>>()?;
        Ok(self.input_hashes.get_or_init(|| hashes))
    }

    /// One of nothing yet.
    fn new(source: &Path) -> Self {
        Self {
            source: source.to_owned(),
            inputs: Vec::new(),
            parts: BTreeMap::new(),
            files: BTreeMap::new(),
            manifest: Manifest::default(),
            notes: Vec::new(),
            input_hashes: OnceLock::new(),
        }
    }

    /// Settings that were made up here.
    fn make(&mut self, path: &str, value: Value, from: impl Into<String>) {
        self.files.insert(path.to_owned(), Content::Json(value, from.into()));
    }

    /// Takes a file as it is, under the same path.
    fn take(&mut self, dir: &Path, path: impl Into<String>) {
        let path = path.into();
        self.files.insert(path.clone(), Content::Copy { dir: dir.to_owned(), path });
    }

    /// Takes config and weights of a part as they are.
    fn take_part(&mut self, dir: &Path, part: &str) -> Result<()> {
        self.take(dir, format!("{part}/config.json"));
        for file in all_weights(&dir.join(part))? {
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            self.take(dir, format!("{part}/{name}"));
        }
        Ok(())
    }

    /// Takes what no checkpoint has, from the source, if it is a directory that has it, or else from the other bundle:
    /// a tokenizer of `vocab_size` entries that fills texts up as `pad` says, and what only training and evaluation
    /// need.
    fn complete(
        &mut self,
        own: Option<&Path>,
        with: Option<&Path>,
        vocab_size: usize,
        pad: Pad,
    ) -> Result<()> {
        let sources: Vec<&Path> = own.into_iter().chain(with).collect();
        let has_tokenizer =
            |dir: &&&Path| TOKENIZER_FILES.iter().any(|f| dir.join("tokenizer").join(f).exists());
        let Some(dir) = sources.iter().find(has_tokenizer) else {
            let what = match (own, with) {
                (_, Some(with)) => return Err(bad(with, "has no tokenizer/, which is wanted of it")),
                (Some(_), None) => format!("has no tokenizer/; {WITH_TOKENIZER}"),
                (None, None) => format!("is a single file, which has no tokenizer; {WITH_TOKENIZER}"),
            };
            return Err(bad(&self.source, what));
        };
        self.take_tokenizer(dir, vocab_size, pad)?;
        let mut taken = if own == Some(*dir) { Vec::new() } else { vec!["tokenizer"] };
        for part in Capability::parts() {
            let Some(dir) = sources.iter().find(|dir| dir.join(part).is_dir()) else { continue };
            self.take_part(dir, part)?;
            if own != Some(*dir) {
                taken.push(part);
            }
        }
        if let (Some(with), false) = (with, taken.is_empty()) {
            self.notes.push(format!("{} from {}", taken.join(", "), with.display()));
        }
        Ok(())
    }

    fn take_tokenizer(&mut self, dir: &Path, vocab_size: usize, pad: Pad) -> Result<()> {
        let place = dir.join("tokenizer");
        let tokenizer = Tokenizer::open(&place)?;
        let n = tokenizer.vocab_size();
        if n > vocab_size || 2 * n < vocab_size {
            // Some rows may have no token; half of them tell that it is another vocabulary.
            let source = self.source.display();
            let what = format!("has {n} tokens, but the text encoder of {source} reads {vocab_size}");
            return Err(bad(&place, what));
        }
        for name in TOKENIZER_FILES.iter().filter(|name| place.join(name).exists()) {
            self.take(dir, format!("tokenizer/{name}"));
        }
        let found = tokenizer.pad();
        let wanted = match pad {
            Pad::AsItIs => found,
            Pad::End => tokenizer.end(),
            Pad::Zero => 0,
        };
        if found != wanted {
            let token = if pad == Pad::Zero { "!" } else { "<|endoftext|>" };
            let [map, config] = ["special_tokens_map.json", "tokenizer_config.json"];
            for name in [map, config].into_iter().filter(|name| *name == map || place.join(name).exists()) {
                let path = place.join(name);
                let settings = if path.exists() { read_json(&path)? } else { json!({}) };
                let settings = changed(&path, settings, "pad_token", token)?;
                let from = format!("tokenizer/{name} of {}, filling texts up with {token}", name_of(dir));
                self.make(&format!("tokenizer/{name}"), settings, from);
            }
            self.notes.push(format!("texts are filled up with {token}, as the text encoder was trained"));
        }
        self.manifest.rare_tokens = rare_tokens(&self.manifest, &tokenizer);
        Ok(())
    }
}

/// What a tokenizer fills texts up with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pad {
    /// What its settings say.
    AsItIs,
    /// The token at the end of each text, as OpenAI's text encoder was trained.
    End,
    /// Token 0, as OpenCLIP's was.
    Zero,
}

/// The last part of a path, for people.
fn name_of(path: &Path) -> String {
    let whole = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    whole.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The name of what is imported: a file's without its suffix, a directory's whole.
fn stem_of(path: &Path) -> String {
    if path.is_dir() {
        return name_of(path);
    }
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// What a bundle says of itself, if it does.
fn manifest_of(dir: &Path) -> Result<Manifest> {
    Ok(read_manifest(dir)?.unwrap_or_default())
}

/// The scheduler's settings, of a file, for a UNet that predicts this.
fn predicting(path: &Path, scheduler: Value, prediction: Prediction) -> Result<Value> {
    changed(path, scheduler, "prediction_type", prediction.word())
}

/// The settings of a file with another value for one of them. An error if they are no object.
fn changed(path: &Path, mut settings: Value, key: &str, value: &str) -> Result<Value> {
    let Some(object) = settings.as_object_mut() else {
        return Err(bad(path, "is not a JSON object"));
    };
    object.insert(key.into(), value.into());
    Ok(settings)
}
