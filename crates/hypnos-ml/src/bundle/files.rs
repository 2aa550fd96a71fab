//! The files of a bundle: their names; finding, reading, hashing and writing them. Errors name the file.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::tensorfile::write_atomically;
use crate::{Error, Result};

/// Names of a part's weight file, by preference.
pub(super) const WEIGHT_FILES: [&str; 6] = [
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
pub(super) const SMALL_FILES: [&str; 9] = [
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

/// transformers and diffusers name their files differently.
pub(crate) fn weight_file(part: &str) -> &'static str {
    if part == "text_encoder" { WEIGHT_FILES[1] } else { WEIGHT_FILES[0] }
}

/// The weight file of a part; if there is none, what is there instead.
pub(super) fn find_weights(dir: &Path) -> Result<PathBuf> {
    if let Some(file) = WEIGHT_FILES.iter().map(|name| dir.join(name)).find(|path| path.exists()) {
        return Ok(file);
    }
    let entries = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut names: Vec<PathBuf> = entries.collect();
    names.sort();
    let suffix = |path: &&PathBuf| path.extension().is_some_and(|e| PICKLES.iter().any(|p| e == *p));
    let name = |path: &PathBuf| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let wanted = format!("no weights ({} or {})", WEIGHT_FILES[0], WEIGHT_FILES[1]);
    let what = if let Some(pickle) = names.iter().find(suffix) {
        format!("{wanted}; there is {}, a pickle: convert it to safetensors", name(pickle))
    } else if let Some(index) = names.iter().find(|path| name(path).ends_with(".safetensors.index.json")) {
        format!("{wanted}; there is {}: join its pieces into one file", name(index))
    } else {
        wanted
    };
    Err(bad(dir, what))
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
