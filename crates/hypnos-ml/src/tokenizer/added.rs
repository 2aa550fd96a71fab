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

use super::object::{Object, Ordered};
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

/// The setting with further special tokens: a list, or an object of named ones.
const EXTRA: &str = "extra_special_tokens";

/// The same, before transformers 5.
const EXTRA_BEFORE: &str = "additional_special_tokens";

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
        if config.get(EXTRA).is_none_or(is_empty)
            && let Some(old) = config.remove(EXTRA_BEFORE)
        {
            config.set(EXTRA.into(), old);
        }
        let mut own = take_own(&mut config);
        let mut numbered: BTreeMap<u32, Token> = BTreeMap::new();
        match config.remove("added_tokens_decoder") {
            Some(Value::Object(entries)) => {
                for (id, token) in entries {
                    let id = id.parse().map_err(|_| {
                        bad(format!("added_tokens_decoder has the id `{id}`; a whole number is wanted"))
                    })?;
                    numbered.insert(id, Token::of_object(&token).map_err(bad)?);
                }
            }
            Some(other) => return Err(bad(format!("added_tokens_decoder is {other}; an object is wanted"))),
            None => {
                let objects = merge_special_tokens_map(dir, &mut config)?;
                own.extend(take_object(&mut config, EXTRA));
                numbered = read_added_tokens(dir, &config, objects)?;
                if let Some(whole) = whole {
                    let listed =
                        listed(whole).map_err(|what| Error::file(dir.join("tokenizer.json"), what))?;
                    numbered.extend(listed);
                }
            }
        }
        Self::of(numbered, config, own).map_err(bad)
    }

    /// From all tokens that have numbers, the settings that name others, and those of them with names of the model's
    /// `own`.
    fn of(
        numbered: BTreeMap<u32, Token>,
        mut config: Object,
        own: Vec<(String, Value)>,
    ) -> Result<Self, String> {
        let mut named = Names::default();
        for (key, default) in NAMED {
            named.set(key.into(), default.map(|text| Given::Text(text.into())));
        }
        for (key, _) in NAMED {
            match config.remove(key) {
                None => {}
                Some(Value::Null) => named.set(key.into(), None),
                Some(value) => {
                    let given = Given::of(&value).map_err(|what| format!("{key} {what}"))?;
                    let known = numbered.values().find(|token| token.content == given.content());
                    named.set(key.into(), Some(known.map_or(given, |token| Given::Token(token.clone()))));
                }
            }
        }
        let extra = match config.remove(EXTRA).or_else(|| config.remove(EXTRA_BEFORE)) {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(tokens)) => {
                let tokens: Result<_, String> = tokens.iter().map(Given::of).collect();
                tokens.map_err(|what| format!("a special token {what}"))?
            }
            Some(Value::Object(tokens)) => {
                set_all(&mut named, tokens)?;
                Vec::new()
            }
            Some(other) => return Err(format!("{EXTRA} is {other}; a list is wanted")),
        };
        let mut others = Object::default();
        for (key, value) in config.into_entries() {
            if key.ends_with("_token") && Given::of(&value).is_ok() {
                others.set(key, value);
            }
        }
        own.into_iter().for_each(|(key, value)| others.set(key, value));
        set_all(&mut named, others.into_entries())?;
        let content = |key: &str| {
            let given = named.get(key).and_then(Option::as_ref);
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
            tokens: registered(numbered, named.values().flatten(), extra),
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

/// Special tokens by their names, in the order of registration.
type Names = Ordered<Option<Given>>;

fn set_all(names: &mut Names, tokens: impl IntoIterator<Item = (String, Value)>) -> Result<(), String> {
    for (key, value) in tokens {
        let given = Given::of(&value).map_err(|what| format!("{key} {what}"))?;
        names.set(key, Some(given));
    }
    Ok(())
}

/// Takes the tokens that have names of the model's own, such as `image_token`: those written as texts, and an object of
/// them.
fn take_own(config: &mut Object) -> Vec<(String, Value)> {
    let is_own = |key: &str| key.ends_with("_token") && NAMED.iter().all(|(name, _)| *name != key);
    let mut own = Object::default();
    let all = std::mem::take(config).into_entries();
    let (texts, rest): (Vec<_>, Vec<_>) =
        all.into_iter().partition(|(key, value)| is_own(key) && value.is_string());
    rest.into_iter().for_each(|(key, value)| config.set(key, value));
    texts.into_iter().chain(take_object(config, EXTRA)).for_each(|(key, value)| own.set(key, value));
    own.into_entries()
}

/// Takes the entries of a setting that is an object.
fn take_object(config: &mut Object, key: &str) -> Vec<(String, Value)> {
    match config.remove(key) {
        Some(Value::Object(entries)) => entries.into_iter().collect(),
        Some(other) => {
            config.set(key.into(), other);
            Vec::new()
        }
        None => Vec::new(),
    }
}

/// Puts what `special_tokens_map.json` says over the settings, as the reference does: objects are special tokens. The
/// texts of those that have names or are extra ones.
fn merge_special_tokens_map(dir: &Path, config: &mut Object) -> Result<BTreeSet<String>> {
    let path = dir.join("special_tokens_map.json");
    let Some(map) = Object::read(&path)? else { return Ok(BTreeSet::new()) };
    let mut objects = BTreeSet::new();
    let mut special = |token: &mut Value, counts: bool| {
        let Value::Object(object) = token else { return };
        object.insert(TYPE.into(), "AddedToken".into());
        object.insert("special".into(), true.into());
        let content = object.get("content").and_then(Value::as_str).filter(|_| counts);
        objects.extend(content.map(str::to_owned));
    };
    for (key, mut value) in map.into_entries() {
        match &mut value {
            Value::Array(new) if key == EXTRA => {
                let mut all = config.get(EXTRA).and_then(Value::as_array).cloned().unwrap_or_default();
                for mut token in std::mem::take(new) {
                    if token.get("special").is_some() {
                        let what = format!("{EXTRA} has {token}; a token without `special` is wanted");
                        return Err(Error::file(&path, what));
                    }
                    special(&mut token, true);
                    if !all.contains(&token) {
                        all.push(token);
                    }
                }
                *new = all;
            }
            Value::Object(_) if key != EXTRA => {
                special(&mut value, NAMED.iter().any(|(name, _)| *name == key));
            }
            _ => {}
        }
        config.set(key, value);
    }
    Ok(objects)
}

/// The tokens of `added_tokens.json` by number. Those are special that the settings name as texts, and those of
/// `objects`.
fn read_added_tokens(dir: &Path, config: &Object, objects: BTreeSet<String>) -> Result<BTreeMap<u32, Token>> {
    let path = dir.join("added_tokens.json");
    let Some(tokens) = Object::read(&path)? else { return Ok(BTreeMap::new()) };
    let named = NAMED.iter().filter_map(|(key, _)| config.get(key));
    let extra = config.get(EXTRA).and_then(Value::as_array);
    let texts = named.chain(extra.into_iter().flatten()).filter_map(Value::as_str).map(str::to_owned);
    let special: BTreeSet<String> = texts.chain(objects).collect();
    let one = |(content, id): (String, Value)| match id.as_u64().and_then(|id| u32::try_from(id).ok()) {
        Some(id) => {
            let is_special = special.contains(&content);
            Ok((id, Token { normalized: Some(!is_special), ..Token::new(content, is_special) }))
        }
        None => {
            Err(Error::file(&path, format!("gives `{content}` the number {id}; a whole number is wanted")))
        }
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

/// The tokens that a `tokenizer.json` adds, with their numbers.
fn listed(rest: &Map<String, Value>) -> Result<Vec<(u32, Token)>, String> {
    let Some(Value::Array(tokens)) = rest.get("added_tokens") else {
        return Err("has no `added_tokens`".into());
    };
    let one = |token: &Value| {
        let id = token.get("id").and_then(Value::as_u64).and_then(|id| u32::try_from(id).ok());
        Ok((
            id.ok_or_else(|| {
                format!("has the added token {token}; an `id` that is a whole number is wanted")
            })?,
            Token::of_object(token)?,
        ))
    };
    tokens.iter().map(one).collect()
}
