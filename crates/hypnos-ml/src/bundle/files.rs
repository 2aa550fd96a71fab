//! The files of a bundle: their names; finding, reading, hashing and writing them. Errors name the file.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::tensorfile::{is_index, shards, write_atomically};
use crate::{Error, Result};

/// A form in which weights are saved.
struct Form {
    suffix: &'static str,
    /// What the weight file of a part is called, without suffixes: by diffusers, and by transformers.
    stems: [&'static str; 2],
}

/// What is read.
const SAFETENSORS: Form = Form { suffix: "safetensors", stems: ["diffusion_pytorch_model", "model"] };

/// What an import converts.
const BIN: Form = Form { suffix: "bin", stems: ["diffusion_pytorch_model", "pytorch_model"] };

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
    let names = names(dir);
    if let Some(name) = find(dir, &names, &SAFETENSORS) {
        return Ok(dir.join(name));
    }
    let stems = stems(dir, &SAFETENSORS).iter().map(|stem| format!("{stem}.safetensors"));
    let wanted = stems.collect::<Vec<_>>().join(" or ");
    Err(bad(
        dir,
        match names.iter().find(|name| is_pickle(name)) {
            Some(pickle) => {
                format!(
                    "has no weights ({wanted}); there is {pickle}, a pickle: `hypnos models import` converts it"
                )
            }
            None => format!("has no weights ({wanted})"),
        },
    ))
}

/// Other weights of the same name that lie beside those that are read, one file beside an index or the reverse: what is
/// left when a model is saved whole over its shards, or in shards over the whole one. Either may be the older.
pub(super) fn ignored_weights(dir: &Path, read: &Path) -> Option<String> {
    let name = read.file_name()?.to_str()?;
    let names = names(dir);
    let plain = SAFETENSORS.stems.iter().map(|stem| weight_names(stem, "", &SAFETENSORS));
    let same = plain.into_iter().find(|of_stem| of_stem.iter().any(|one| one == name))?;
    same.into_iter().find(|other| other != name && names.contains(other))
}

/// The weights of a part that are pickles, or the index of several: by the names that diffusers and transformers give,
/// or else the only one.
pub(super) fn find_pickle(dir: &Path) -> Option<PathBuf> {
    let names = names(dir);
    let pickles: Vec<&String> = names.iter().filter(|name| is_pickle(name)).collect();
    let only = || if let [only] = pickles.as_slice() { Some((*only).clone()) } else { None };
    find(dir, &names, &BIN).or_else(only).map(|name| dir.join(name))
}

/// The names of what is in a directory, sorted.
fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn is_pickle(name: &str) -> bool {
    Path::new(name).extension().is_some_and(|suffix| PICKLES.iter().any(|pickle| suffix == *pickle))
}

/// What the weight file of a part may be called, without suffixes.
fn stems<'a>(dir: &Path, form: &'a Form) -> &'a [&'static str] {
    match dir.file_name().and_then(|part| part.to_str()) {
        Some("text_encoder") => &form.stems[1..],
        Some("unet" | "vae") => &form.stems[..1],
        _ => &form.stems,
    }
}

/// The file or the index of a part's weights, out of the names of what is there.
fn find(dir: &Path, names: &[String], form: &Form) -> Option<String> {
    stems(dir, form).iter().find_map(|stem| {
        let known = VARIANTS.iter().map(|variant| (*variant).to_owned());
        let others = names.iter().filter_map(|name| variant(name, stem, form));
        let variants = std::iter::once(String::new()).chain(known).chain(others);
        let mut all = variants.flat_map(|variant| weight_names(stem, &variant, form));
        all.find(|name| names.contains(name))
    })
}

/// The names of the files that may hold a variant's weights (none: the plain ones), by preference.
fn weight_names(stem: &str, variant: &str, form: &Form) -> Vec<String> {
    let (dot, suffix) = (if variant.is_empty() { "" } else { "." }, form.suffix);
    let file = format!("{stem}{dot}{variant}.{suffix}");
    let index = format!("{stem}.{suffix}.index{dot}{variant}.json");
    let older = format!("{stem}.{suffix}{dot}{variant}.index.json");
    if stem == form.stems[1] { vec![file, index] } else { vec![index, older, file] }
}

/// The variant whose weights a file of this name holds or lists.
fn variant(name: &str, stem: &str, form: &Form) -> Option<String> {
    let rest = name.strip_prefix(stem)?.strip_prefix('.')?;
    let file = rest.strip_suffix(form.suffix).and_then(|rest| rest.strip_suffix('.'));
    let file = file.filter(|variant| !is_shard(variant));
    let listed = rest.strip_prefix(form.suffix);
    let index = || listed?.strip_prefix(".index.")?.strip_suffix(".json");
    let older = || listed?.strip_prefix('.')?.strip_suffix(".index.json");
    file.or_else(index).or_else(older).map(str::to_owned)
}

/// Whether the name of a variant ends as that of one file of several does: `-00001-of-00002`.
fn is_shard(variant: &str) -> bool {
    let number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    variant.rsplit_once("-of-").is_some_and(|(before, total)| {
        number(total) && before.rsplit_once('-').is_some_and(|(_, place)| number(place))
    })
}

/// The weight file of a part; if there are several, their index and them.
pub(super) fn all_weights(dir: &Path) -> Result<Vec<PathBuf>> {
    let path = find_weights(dir)?;
    let shards = if is_index(&path) { shards(&path)? } else { Vec::new() };
    Ok([vec![path], shards].concat())
}

/// Refuses a place for a new directory where something is.
pub(super) fn vacant(out: &Path) -> Result<()> {
    match fs::read_dir(out).map(|mut entries| entries.next().is_none()) {
        Ok(true) => Ok(()),
        Ok(false) => Err(bad(out, "is not empty; a new directory is wanted")),
        Err(_) if out.symlink_metadata().is_err() => Ok(()),
        Err(e) => Err(Error::io(out, "is no directory that can be used", e)),
    }
}

/// The text of a file; [`Error::File`] if there is none or it is not UTF-8.
pub(super) fn read_text(path: &Path) -> Result<String> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(text),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Err(bad(path, "is missing")),
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

/// SHA-256 of a file, in lower-case hexadecimal. Reads all of it.
pub fn hash_file(path: &Path) -> Result<String> {
    let failed = |e: io::Error| Error::io(path, "cannot be read", e);
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

/// Makes the directory `out`, which `fill` fills under another name: it appears whole, or not at all. Errors name it as it
/// will be called.
pub(crate) fn make_directory(out: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    // As components, so that a slash at the end of `out` does not put it inside.
    let mut part = out.components().as_path().as_os_str().to_owned();
    part.push(format!(".{}.part", std::process::id()));
    let part = PathBuf::from(part);
    let made = create_directory(&part)
        .and_then(|()| fill(&part))
        .and_then(|()| fs::rename(&part, out).map_err(|e| Error::io(out, "cannot be created", e)));
    made.map_err(|error| {
        let _ = fs::remove_dir_all(&part); // the first error is the one worth telling
        error.renamed(&part, out)
    })
}

/// Makes a directory and those that it lies in, unless they are there.
pub(super) fn create_directory(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).map_err(|e| Error::io(dir, "cannot be created", e))
}

/// Copies a file, whole or not at all, and makes the directories that the copy lies in.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<()> {
    let mut file = File::open(from).map_err(|e| Error::io(from, "cannot be opened", e))?;
    to.parent().map_or(Ok(()), create_directory)?;
    write_atomically(to, |out| {
        io::copy(&mut file, out).map(drop).map_err(|e| Error::io(to, "cannot be written", e))
    })
}

pub(super) fn write_text(path: &Path, text: &str) -> Result<()> {
    path.parent().map_or(Ok(()), create_directory)?;
    write_atomically(path, |out| {
        out.write_all(text.as_bytes()).map_err(|e| Error::io(path, "cannot be written", e))
    })
}

pub(super) fn odd(e: &serde_json::Error) -> Error {
    Error::input(format!("JSON cannot be written: {e}"))
}
