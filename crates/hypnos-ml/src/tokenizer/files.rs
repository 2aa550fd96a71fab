//! The files of a tokenizer, in every form that transformers has written them.
//!
//! Words and merges come from `tokenizer.json` if it is there, as in the reference, else from `vocab.json` and
//! `merges.txt`. Everything else of `tokenizer.json` is CLIP's own and not read. Tokens on top of the words are in as many
//! places as there were versions: [`super::added`] puts them together.

use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::models::bpe::{Merges, Vocab};

use super::added::AddedTokens;
use super::object::{Object, read_text};
use crate::{Error, Result};

/// Tokens in a text where the files do not say, as in every CLIP.
const LENGTH: usize = 77;

/// What the files say.
pub(super) struct Files {
    /// Words and their numbers.
    pub(super) vocab: Vocab,
    /// The pairs to merge, the most frequent first.
    pub(super) merges: Vec<(String, String)>,
    /// The tokens on top.
    pub(super) added: AddedTokens,
    /// Tokens of a text.
    pub(super) length: usize,
    /// Whether a text that is too long loses its beginning.
    pub(super) truncates_left: bool,
    /// Whether padding comes first.
    pub(super) pads_left: bool,
    /// Whether special tokens in a text are read as any other text.
    pub(super) splits_special: bool,
}

impl Files {
    /// Reads them in `dir`. [`Error::File`] names the file, and the line where there is one.
    pub(super) fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer_config.json");
        let config = Object::read(&path)?.unwrap_or_default();
        let whole = dir.join("tokenizer.json");
        let (vocab, merges, whole) = if whole.exists() {
            let (vocab, merges, rest) = read_whole(&whole)?;
            (vocab, merges, Some(rest))
        } else {
            (read_vocab(&dir.join("vocab.json"))?, read_merges(&dir.join("merges.txt"))?, None)
        };
        let bad = |what: String| Error::file(&path, what);
        let side = |key: &str, section: &str| {
            let theirs = whole.as_ref().and_then(|rest| rest.get(section)?.get("direction")?.as_str());
            match config.get(key).map_or(theirs, Value::as_str) {
                None => Ok(false),
                Some(side) if side.eq_ignore_ascii_case("right") => Ok(false),
                Some(side) if side.eq_ignore_ascii_case("left") => Ok(true),
                Some(side) => Err(bad(format!("{key} is \"{side}\"; left or right is wanted"))),
            }
        };
        let length = match config.get("model_max_length").or_else(|| config.get("max_len")).map(Value::as_f64)
        {
            Some(Some(n)) if n < 3. => {
                return Err(bad(format!("model_max_length is {n}; at least 3 is wanted")));
            }
            Some(Some(n)) if n <= 4096. => n as usize,
            _ => LENGTH, // absent, or 1e30, the reference's word for absent
        };
        Ok(Self {
            length,
            truncates_left: side("truncation_side", "truncation")?,
            pads_left: side("padding_side", "padding")?,
            splits_special: config.get("split_special_tokens") == Some(&Value::Bool(true)),
            added: AddedTokens::read(dir, config, whole.as_ref())?,
            vocab,
            merges,
        })
    }
}

/// Words, merges and the rest of a `tokenizer.json`.
fn read_whole(path: &Path) -> Result<(Vocab, Merges, Map<String, Value>)> {
    let bad = |what: String| Error::file(path, what);
    let mut rest: Map<String, Value> = serde_json::from_str(&read_text(path)?)
        .map_err(|e| Error::file_from(path, format!("is not a JSON object: {e}"), e))?;
    let Some(Value::Object(mut model)) = rest.remove("model") else {
        return Err(bad("has no `model`".into()));
    };
    // Departure: the reference makes byte pairs of any model's words; CLIP's are byte pairs from the start.
    if let Some(kind) = model.get("type").filter(|kind| *kind != "BPE") {
        return Err(bad(format!("holds a tokenizer of type {kind}; \"BPE\" is wanted")));
    }
    let (Some(Value::Object(words)), Some(Value::Array(merges))) =
        (model.remove("vocab"), model.remove("merges"))
    else {
        return Err(bad("has no `vocab` and `merges` in its model".into()));
    };
    let number = |(word, id): (String, Value)| match id.as_u64().and_then(|id| u32::try_from(id).ok()) {
        Some(id) => Ok((word, id)),
        None => Err(bad(format!("gives `{word}` the number {id}; a whole number is wanted"))),
    };
    let vocab = words.into_iter().map(number).collect::<Result<_>>()?;
    let pair = |merge: Value| {
        let parts = match &merge {
            Value::String(text) => text.split(' ').map(str::to_owned).collect(), // until tokenizers 0.20
            Value::Array(parts) => parts.iter().filter_map(|part| Some(part.as_str()?.to_owned())).collect(),
            _ => Vec::new(),
        };
        <[String; 2]>::try_from(parts)
            .map(|[a, b]| (a, b))
            .map_err(|_| bad(format!("has the merge {merge}; two symbols are wanted")))
    };
    Ok((vocab, merges.into_iter().map(pair).collect::<Result<_>>()?, rest))
}

fn read_vocab(path: &Path) -> Result<Vocab> {
    let vocab: Map<String, Value> = serde_json::from_str(&read_text(path)?)
        .map_err(|e| Error::file_from(path, format!("is not a JSON object of token numbers: {e}"), e))?;
    let numbers = vocab.into_iter().filter(|(_, id)| id.is_number()); // the reference passes over the rest
    let number = |(word, id): (String, Value)| match id.as_u64().and_then(|id| u32::try_from(id).ok()) {
        Some(id) => Ok((word, id)),
        None => Err(Error::file(path, format!("is not a JSON object of token numbers: `{word}` has {id}"))),
    };
    numbers.map(number).collect()
}

/// After an optional `#version` line, two symbols a line.
fn read_merges(path: &Path) -> Result<Vec<(String, String)>> {
    let text = read_text(path)?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.starts_with("#version"));
    lines
        .map(|(i, line)| match line.split(' ').collect::<Vec<_>>()[..] {
            [a, b] => Ok((a.to_owned(), b.to_owned())),
            _ => Err(Error::file(path, format!("line {}: two symbols are wanted, got `{line}`", i + 1))),
        })
        .collect()
}
