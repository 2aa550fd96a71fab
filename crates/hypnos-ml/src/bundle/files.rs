//! The files of a bundle: their names; finding, reading, hashing and writing them. Errors name the file.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::tensorfile::{is_index, shards, write_atomically};
use crate::{Error, Result};

/// What the weight file of a part is called, without suffixes: by diffusers, and by transformers.
const STEMS: [&str; 2] = ["diffusion_pytorch_model", "model"];

/// Variants of weights that are read where there are no plain ones, by preference, before any other.
const VARIANTS: [&str; 3] = ["fp16", "bf16", "non_ema"];

/// Files with other suffixes that mean weights are there, but not in a form that is read.
const PICKLES: [&str; 4] = ["bin", "ckpt", "pt", "pth"];

/// The small files of a bundle that decide what it draws; the weight files beside them do as well.
pub(super) const SMALL_FILES: [&str; 11] = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "tokenizer/added_tokens.json",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "vae/config.json",
];

/// What the plain weight file of a part is called: transformers and diffusers name theirs differently.
pub(crate) fn weight_file(part: &str) -> &'static str {
    if part == "text_encoder" { "model.safetensors" } else { "diffusion_pytorch_model.safetensors" }
}

/// What the plain weight file would be called, or the plain index of several, in the place of this one.
pub(crate) fn plain_name(part: &str, path: &Path) -> String {
    if is_index(path) { format!("{}.index.json", weight_file(part)) } else { weight_file(part).to_owned() }
}

/// The weight file of a part, or the index of several; if there is none, what is there instead.
///
/// As diffusers and transformers have it: an index goes before a file in diffusers' parts, and after it in the text
/// encoder. Departure: where there are variants only, such as `fp16`, the reference wants to be told which; here they are
/// taken in the order of [`VARIANTS`]. Frozen networks may have either name.
pub(super) fn find_weights(dir: &Path) -> Result<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    let stems = match dir.file_name().and_then(|part| part.to_str()) {
        Some("text_encoder") => &STEMS[1..],
        Some("unet" | "vae") => &STEMS[..1],
        _ => &STEMS[..],
    };
    let found = stems.iter().find_map(|stem| {
        let known = VARIANTS.iter().map(|variant| (*variant).to_owned());
        let others = names.iter().filter_map(|name| variant(name, stem));
        let variants = std::iter::once(String::new()).chain(known).chain(others);
        let mut all = variants.flat_map(|variant| weight_names(stem, &variant));
        all.find(|name| names.contains(name))
    });
    if let Some(name) = found {
        return Ok(dir.join(name));
    }
    let wanted = stems.iter().map(|stem| format!("{stem}.safetensors")).collect::<Vec<_>>().join(" or ");
    let pickle =
        |name: &&String| Path::new(name).extension().is_some_and(|e| PICKLES.iter().any(|p| e == *p));
    Err(bad(
        dir,
        match names.iter().find(pickle) {
            Some(pickle) => {
                format!("no weights ({wanted}); there is {pickle}, a pickle: convert it to safetensors")
            }
            None => format!("no weights ({wanted})"),
        },
    ))
}

/// The names of the files that may hold a variant's weights (none: the plain ones), by preference.
fn weight_names(stem: &str, variant: &str) -> Vec<String> {
    let dot = if variant.is_empty() { "" } else { "." };
    let file = format!("{stem}{dot}{variant}.safetensors");
    let index = format!("{stem}.safetensors.index{dot}{variant}.json");
    let older = format!("{stem}.safetensors{dot}{variant}.index.json");
    if stem == STEMS[1] { vec![file, index] } else { vec![index, older, file] }
}

/// The variant whose weights a file of this name holds or lists.
fn variant(name: &str, stem: &str) -> Option<String> {
    let rest = name.strip_prefix(stem)?.strip_prefix('.')?;
    let file = rest.strip_suffix(".safetensors").filter(|variant| !variant.contains('-')); // a shard has one
    let index = || rest.strip_prefix("safetensors.index.")?.strip_suffix(".json");
    let older = || rest.strip_prefix("safetensors.")?.strip_suffix(".index.json");
    file.or_else(index).or_else(older).map(str::to_owned)
}

/// The weight file of a part; if there are several, their index and them.
pub(super) fn all_weights(dir: &Path) -> Result<Vec<PathBuf>> {
    let path = find_weights(dir)?;
    let shards = if is_index(&path) { shards(&path)? } else { Vec::new() };
    Ok([vec![path], shards].concat())
}

/// The text of a file; [`Error::File`] if there is none or it is not UTF-8.
pub(super) fn read_text(path: &Path) -> Result<String> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(text),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Err(bad(path, "is missing")),
        Err(e) => Err(Error::io(path, "cannot be read", e)),
    }
}

/// Any JSON file.
pub(crate) fn read_json(path: &Path) -> Result<Value> {
    serde_json::from_str(&read_text(path)?)
        .map_err(|e| Error::file_from(path, format!("is not JSON: {e}"), e))
}

pub(super) fn bad(path: &Path, what: impl std::fmt::Display) -> Error {
    Error::file(path, what.to_string())
}

/// SHA-256 of a file, in lower-case hexadecimal.
pub(crate) fn hash_file(path: &Path) -> Result<String> {
    let failed = |e: std::io::Error| Error::io(path, "cannot be read", e);
    let mut file = File::open(path).map_err(failed)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(failed)? {
            0 => return Ok(format!("{:x}", hash.finalize())),
            n => hash.update(&buffer[..n]),
        }
    }
}

/// SHA-256 of a file, or one hash of several: of the lines of their hashes.
pub(crate) fn hash_files(paths: &[PathBuf]) -> Result<String> {
    if let [path] = paths {
        return hash_file(path);
    }
    let mut all = Sha256::new();
    for path in paths {
        all.update(format!("{}\n", hash_file(path)?));
    }
    Ok(format!("{:x}", all.finalize()))
}

/// Writes a JSON file, whole or not at all, and the directories that it lies in. [`Error::File`](crate::Error) if it
/// cannot.
pub fn write_json(path: &Path, value: &Value) -> Result<()> {
    write_text(path, &format!("{}\n", serde_json::to_string_pretty(value).map_err(|e| odd(&e))?))
}

pub(super) fn write_text(path: &Path, text: &str) -> Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(|e| Error::io(parent, "cannot be created", e))?;
    }
    write_atomically(path, |out| {
        out.write_all(text.as_bytes()).map_err(|e| Error::io(path, "cannot be written", e))
    })
}

pub(super) fn odd(e: &serde_json::Error) -> Error {
    Error::input(format!("JSON cannot be written: {e}"))
}
