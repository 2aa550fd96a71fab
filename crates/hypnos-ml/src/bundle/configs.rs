//! The configs of a bundle's parts, read and checked.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::files::{bad, read_json, read_text};
use crate::{Error, Result};

/// The parts with weights, and the class that `model_index.json` gives for each.
pub(super) const PARTS: [(&str, &str); 3] =
    [("text_encoder", "CLIPTextModel"), ("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL")];

/// Largest whole number believed in a model's config: a vocabulary has 49,408 entries, a layer 1,280 channels.
const SIZE_MAX: u64 = 1_000_000;

/// Most layers believed; the real text encoder has 12.
const LAYERS_MAX: u64 = 100;

/// Most levels believed; the real UNet has 4.
const LEVELS_MAX: usize = 12;

/// A part's `config.json`, checked. Where a text encoder's is that of a whole CLIP, its section for texts.
pub(super) fn read_config<T: DeserializeOwned>(
    dir: &Path,
    part: &str,
    check: impl Fn(&T) -> Result<()>,
) -> Result<T> {
    let path = dir.join(part).join("config.json");
    let value = read_json(&path)?;
    check_limits(&value).map_err(|what| bad(&path, what))?;
    let named = |e: serde_json::Error| Error::file_from(&path, e.to_string(), e);
    let config: T = match value.get("text_config").filter(|_| part == "text_encoder") {
        Some(text) => serde_json::from_value(text.clone()).map_err(named)?,
        None => serde_json::from_str(&read_text(&path)?).map_err(named)?, // its errors have lines
    };
    check(&config).map_err(|e| at(&path, e))?;
    Ok(config)
}

/// Refuses numbers that no model has, before anything is computed from them.
fn check_limits(config: &Value) -> Result<(), String> {
    let Some(config) = config.as_object() else { return Err("is not a JSON object".into()) };
    for (key, value) in config {
        if value.is_object() {
            check_limits(value).map_err(|what| format!("{key}: {what}"))?;
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

/// `model_index.json`, where there is one. Departure: the reference does not open a directory without it.
pub(super) fn read_index(dir: &Path) -> Result<Option<Value>> {
    let path = dir.join("model_index.json");
    if path.exists() { read_json(&path).map(Some) } else { Ok(None) }
}

/// Refuses an index that names a class of a part other than the one that is implemented here.
pub(super) fn check_index(dir: &Path) -> Result<()> {
    let Some(index) = read_index(dir)? else { return Ok(()) };
    for (part, class) in PARTS.into_iter().chain([("tokenizer", "CLIPTokenizer")]) {
        let found = &index[part][1];
        let fits = found.as_str().is_some_and(|name| name.trim_end_matches("Fast") == class);
        if !found.is_null() && !fits {
            return Err(bad(&dir.join("model_index.json"), format!("{part} is {found}, wanted \"{class}\"")));
        }
    }
    Ok(())
}

/// What a config's own check said, with the whole path of the file.
pub(super) fn at(path: &Path, error: Error) -> Error {
    match error {
        Error::File { what, source, .. } => Error::File { path: path.to_owned(), what, source },
        error if error.is_input() => bad(path, error),
        other => other,
    }
}

/// `model_index.json` of a bundle of ours, with a scheduler of this class.
pub fn model_index(scheduler: &str) -> Value {
    json!({
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [null, null],
        "requires_safety_checker": false,
        "safety_checker": [null, null],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    })
}
