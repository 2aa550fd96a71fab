//! The tokens that come on top of a vocabulary: start, end, unknown and padding, and placeholders such as those of
//! textual inversion.
//!
//! Ported: transformers 5.23.0, `PreTrainedTokenizerBase._from_pretrained` in `tokenization_utils_base.py` and
//! `TokenizersBackend.__init__` in `tokenization_utils_tokenizers.py`. The files, from the newest form to the oldest:
//!
//! * `added_tokens_decoder` in `tokenizer_config.json`; where it is, no other file is asked
//! * `added_tokens` in `tokenizer.json`
//! * `added_tokens.json` and `special_tokens_map.json`
//! * `additional_special_tokens` or `extra_special_tokens` in any of the small files
//!
//! A token that is in the vocabulary keeps its number there. Others are numbered on from its end in the order in which
//! they are registered, whatever number the files give them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::files::{Object, listed};
use crate::{Error, Result};

/// The special tokens that have names, in the order in which they are registered, and what CLIP has for them where the
/// files do not say.
const NAMED: [(&str, Option<&str>); 7] = [
    ("bos_token", Some("<|startoftext|>")),
    ("eos_token", Some("<|endoftext|>")),
    ("unk_token", Some("<|endoftext|>")),
    ("sep_token", None),
    ("pad_token", Some("<|endoftext|>")),
    ("cls_token", None),
    ("mask_token", None),
];

/// What makes a JSON object a token wherever a value may stand.
const TYPE: &str = "__type";

/// A token as the files give it.
#[allow(clippy::struct_excessive_bools)] // the fields of the files
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Token {
    content: String,
    special: bool,
    /// Whether it is looked for in the normalised text; if the file does not say, when it is not special.
    normalized: Option<bool>,
    lstrip: bool,
    rstrip: bool,
    single_word: bool,
}

/// What a file gives as a token: a text, or more.
#[derive(Clone, Debug, PartialEq)]
enum Given {
    Text(String),
    Token(Token),
}

/// The tokens on top of a vocabulary.
#[derive(Debug)]
pub(super) struct AddedTokens {
    /// To be registered, in this order.
    pub(super) tokens: Vec<AddedToken>,
    /// Those of them to which the files give a number.
    numbered: BTreeSet<String>,
    /// What begins a text.
    pub(super) start: String,
    /// What ends it.
    pub(super) end: String,
    /// What fills it up.
    pub(super) pad: String,
    /// What stands for symbols that the vocabulary does not have.
    pub(super) unknown: String,
}

impl Token {
    fn new(content: impl Into<String>, special: bool) -> Self {
        let content = content.into();
        Self { content, special, normalized: None, lstrip: false, rstrip: false, single_word: false }
    }

    /// A token written as a JSON object. One without a text is never found in any.
    pub(super) fn of_object(value: &Value) -> Result<Self, String> {
        let bad = || format!("has {value} where a token is wanted");
        let object = value.as_object().ok_or_else(bad)?;
        let content = object.get("content").map_or(Some(""), Value::as_str).ok_or_else(bad)?;
        let flag = |name: &str| value.get(name).and_then(Value::as_bool);
        let is = |name: &str| flag(name).unwrap_or(false);
        Ok(Self {
            normalized: flag("normalized"),
            lstrip: is("lstrip"),
            rstrip: is("rstrip"),
            single_word: is("single_word"),
            ..Self::new(content, is("special"))
        })
    }

    fn registered(self) -> AddedToken {
        let normalized = self.normalized.unwrap_or(!self.special);
        AddedToken::from(self.content, self.special)
            .normalized(normalized)
            .lstrip(self.lstrip)
            .rstrip(self.rstrip)
            .single_word(self.single_word)
    }
}

impl Given {
    /// A text, or an object that says of itself that it is a token.
    fn of(value: &Value) -> Result<Self, String> {
        match value {
            Value::String(text) => Ok(Self::Text(text.clone())),
            Value::Object(object) if object.get(TYPE).is_some_and(|kind| kind == "AddedToken") => {
                Ok(Self::Token(Token::of_object(value)?))
            }
            _ => Err(format!("is {value}; a token is wanted")),
        }
    }

    fn content(&self) -> &str {
        match self {
            Self::Text(text) => text,
            Self::Token(token) => &token.content,
        }
    }
}

impl AddedTokens {
    /// Those of the files in `dir`: `config` is its `tokenizer_config.json`, `whole` its `tokenizer.json`. [`Error::File`]
    /// names the file that holds something else where a token is wanted.
    pub(super) fn read(dir: &Path, mut config: Object, whole: Option<&Map<String, Value>>) -> Result<Self> {
        let bad = |what: String| Error::file(dir.join("tokenizer_config.json"), what);
        if let Some(Value::Array(old)) = config.get("additional_special_tokens")
            && config.get("extra_special_tokens").is_none_or(is_empty)
        {
            let old = Value::Array(old.clone());
            config.remove("additional_special_tokens");
            config.set("extra_special_tokens".into(), old);
        }
        let mut numbered: BTreeMap<u32, Token> = BTreeMap::new();
        match config.remove("added_tokens_decoder") {
            Some(Value::Object(entries)) => {
                for (id, token) in entries {
                    let id =
                        id.parse().map_err(|_| bad(format!("added_tokens_decoder has the id `{id}`")))?;
                    numbered.insert(id, Token::of_object(&token).map_err(bad)?);
                }
            }
            Some(other) => return Err(bad(format!("added_tokens_decoder is {other}; an object is wanted"))),
            None => {
                merge_special_tokens_map(dir, &mut config)?;
                numbered = read_added_tokens(dir, &config)?;
                if let Some(whole) = whole {
                    let listed =
                        listed(whole).map_err(|what| Error::file(dir.join("tokenizer.json"), what))?;
                    numbered.extend(listed);
                }
            }
        }
        Self::of(numbered, config).map_err(bad)
    }

    /// From all tokens that have numbers, and the settings that name others.
    fn of(numbered: BTreeMap<u32, Token>, config: Object) -> Result<Self, String> {
        let mut named: Vec<(String, Option<Given>)> =
            NAMED.map(|(key, default)| (key.into(), default.map(|text| Given::Text(text.into())))).into();
        let mut extra = Vec::new();
        if config.get("extra_special_tokens").is_none()
            && let Some(Value::Array(tokens)) = config.get("additional_special_tokens")
        {
            extra.clone_from(tokens);
        }
        for (key, value) in config.into_entries() {
            let place = named.iter().position(|(name, _)| *name == key);
            match (place, value) {
                (Some(place), Value::Null) => named[place].1 = None,
                (Some(place), value) => {
                    let given = Given::of(&value).map_err(|what| format!("{key} {what}"))?;
                    let known = numbered.values().find(|token| token.content == given.content());
                    named[place].1 = Some(known.map_or(given, |token| Given::Token(token.clone())));
                }
                (None, Value::Array(tokens)) if key == "extra_special_tokens" => extra = tokens,
                (None, Value::Object(tokens)) if key == "extra_special_tokens" => {
                    for (key, value) in tokens {
                        named.push((key, Some(Given::of(&value)?)));
                    }
                }
                (None, value) if key.ends_with("_token") => {
                    named.extend(Given::of(&value).ok().map(|g| (key, Some(g))));
                }
                _ => {}
            }
        }
        let extra: Vec<Given> = extra
            .iter()
            .map(Given::of)
            .collect::<Result<_, _>>()
            .map_err(|what| format!("a special token {what}"))?;
        let content = |key: &str| {
            let given = named.iter().find(|(name, _)| name == key).and_then(|(_, given)| given.as_ref());
            given
                .map(|given| given.content().to_owned())
                .ok_or_else(|| format!("{key} is null; a token is wanted"))
        };
        Ok(Self {
            start: content("bos_token")?,
            end: content("eos_token")?,
            pad: content("pad_token")?,
            unknown: content("unk_token").unwrap_or_default(),
            numbered: numbered.values().map(|token| token.content.clone()).collect(),
            tokens: registered(numbered, named.iter().filter_map(|(_, given)| given.as_ref()), extra),
        })
    }

    /// Whether a file gives this token a number.
    pub(super) fn is_numbered(&self, token: &str) -> bool {
        self.numbered.contains(token)
    }
}

/// The tokens in the order of their registration: those with numbers, those with names, the rest. Where one text is
/// registered twice, the later form stays.
fn registered<'a>(
    numbered: BTreeMap<u32, Token>,
    named: impl Iterator<Item = &'a Given> + Clone,
    extra: Vec<Given>,
) -> Vec<AddedToken> {
    let known: BTreeSet<String> = numbered.values().map(|token| token.content.clone()).collect();
    let names: BTreeSet<&str> = named.clone().map(Given::content).collect();
    let mut all: Vec<Given> = numbered.into_values().map(Given::Token).collect();
    for given in named.clone().cloned().chain(extra) {
        if !known.contains(given.content()) && !all.contains(&given) {
            all.push(given);
        }
    }
    let token = |given| match given {
        Given::Text(text) => Token::new(text, true),
        Given::Token(token) => {
            Token { special: token.special || names.contains(token.content.as_str()), ..token }
        }
    };
    all.into_iter().map(|given| token(given).registered()).collect()
}

/// Puts what `special_tokens_map.json` says over the settings, as the reference does.
fn merge_special_tokens_map(dir: &Path, config: &mut Object) -> Result<()> {
    let Some(map) = Object::read(&dir.join("special_tokens_map.json"))? else { return Ok(()) };
    for (key, mut value) in map.into_entries() {
        if let Value::Object(token) = &mut value
            && key != "extra_special_tokens"
        {
            token.insert(TYPE.into(), "AddedToken".into());
            token.insert("special".into(), true.into());
        }
        if let (Value::Array(new), Some(Value::Array(old))) = (&value, config.get(&key))
            && key == "extra_special_tokens"
        {
            let new = new.iter().filter(|token| !old.contains(token));
            value = Value::Array(old.iter().chain(new).cloned().collect());
        }
        config.set(key, value);
    }
    Ok(())
}

/// The tokens of `added_tokens.json` by number; those that the settings name are special.
fn read_added_tokens(dir: &Path, config: &Object) -> Result<BTreeMap<u32, Token>> {
    let path = dir.join("added_tokens.json");
    let Some(tokens) = Object::read(&path)? else { return Ok(BTreeMap::new()) };
    let named = NAMED.iter().filter_map(|(key, _)| config.get(key));
    let extra = config.get("extra_special_tokens").and_then(Value::as_array);
    let special: BTreeSet<&str> = named
        .chain(extra.into_iter().flatten())
        .filter_map(|value| value.as_str().or_else(|| value.get("content")?.as_str()))
        .collect();
    let one = |(content, id): (String, Value)| match id.as_u64().and_then(|id| u32::try_from(id).ok()) {
        Some(id) => {
            let is_special = special.contains(content.as_str());
            Ok((id, Token { normalized: Some(!is_special), ..Token::new(content, is_special) }))
        }
        None => Err(Error::file(&path, format!("gives `{content}` the number {id}"))),
    };
    tokens.into_entries().into_iter().map(one).collect()
}

/// Whether Python takes it for false.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(values) => values.is_empty(),
        Value::Object(values) => values.is_empty(),
        _ => false,
    }
}
