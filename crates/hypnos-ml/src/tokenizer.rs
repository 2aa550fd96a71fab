//! Text to the 77 token numbers that the text encoder reads.
//!
//! CLIP's byte-pair encoding (Radford et al. 2021, arXiv 2103.00020, section 2.4) from `vocab.json` and `merges.txt`,
//! put together as `transformers` 5.23.0 does in `models/clip/tokenization_clip.py` and
//! `tokenization_utils_tokenizers.py`. The encoding itself is the reference's own crate. There is no decoding, and
//! no `tokenizer.json`: the class it describes is not always CLIP's.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence as Normalizers, replace::ReplacePattern};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use super::{Error, Result};

/// What CLIP takes for a word: its own marks, English endings, runs of letters, single digits, runs of the rest.
const WORDS: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// Tokens in a text where the files do not say, as in every CLIP.
const LENGTH: usize = 77;

/// The order in which the reference registers its special tokens, and what they are when the files do not say.
const SPECIAL: [(&str, &str); 4] = [
    ("bos_token", "<|startoftext|>"),
    ("eos_token", "<|endoftext|>"),
    ("unk_token", "<|endoftext|>"),
    ("pad_token", "<|endoftext|>"),
];

/// CLIP's tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    start: u32,
    end: u32,
    pad: u32,
    length: usize,
    vocab_size: usize,
}

impl Tokenizer {
    /// Reads `vocab.json` and `merges.txt`, and `tokenizer_config.json` and `special_tokens_map.json` where they
    /// exist. [`Error::File`] names the file, and the line where there is one.
    pub fn open(dir: &Path) -> Result<Tokenizer> {
        let vocab = read_vocab(&dir.join("vocab.json"))?;
        let merges = read_merges(&dir.join("merges.txt"))?;
        let settings = TokenizerSettings::read(dir)?;
        let bad = |what: String| Error::file(dir, what);
        let id = |key: &str| {
            let content = settings.special[key].content.as_str();
            vocab
                .get(content)
                .copied()
                .ok_or_else(|| bad(format!("vocab.json has no `{content}`, the {key}")))
        };
        let (start, end, pad) = (id("bos_token")?, id("eos_token")?, id("pad_token")?);
        let vocab_size = vocab.values().max().map_or(0, |id| *id as usize + 1);
        let unknown = settings.special["unk_token"].content.clone();
        let inner = build(vocab, merges, unknown, settings.added()).map_err(|e| bad(e.to_string()))?;
        Ok(Tokenizer { inner, start, end, pad, length: settings.length, vocab_size })
    }

    /// The ids of a text, exactly [`Tokenizer::length`] of them: start, the text's tokens as far as they fit, end,
    /// then padding.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut ids = vec![self.start];
        ids.extend(self.tokens(text).into_iter().take(self.length - 2));
        ids.push(self.end);
        ids.resize(self.length, self.pad);
        ids
    }

    /// How many tokens a text has, without start and end. Beyond [`Tokenizer::length`] - 2 they are cut off.
    pub fn count(&self, text: &str) -> usize {
        self.tokens(text).len()
    }

    /// The one token that a word is, if it is one; asked of rare tokens, so start, end and unknown do not count.
    pub(crate) fn id(&self, word: &str) -> Option<u32> {
        match self.tokens(word)[..] {
            [token] if ![self.start, self.end, self.pad].contains(&token) => Some(token),
            _ => None,
        }
    }

    /// Whether a word is one token of the vocabulary.
    pub fn is_single_token(&self, word: &str) -> bool {
        self.id(word).is_some()
    }

    /// All words of ASCII letters and digits that are one token each, sorted.
    pub fn whole_words(&self) -> Vec<String> {
        let vocab = self.inner.get_vocab(false);
        let whole = vocab.keys().filter_map(|token| token.strip_suffix("</w>"));
        let plain = whole.filter(|word| word.bytes().all(|byte| byte.is_ascii_alphanumeric()));
        let mut words: Vec<String> = plain.map(ToOwned::to_owned).collect();
        words.sort_unstable();
        words
    }

    /// The tokens of a text, without start and end, all of them.
    pub(crate) fn words(&self, text: &str) -> Vec<u32> {
        self.tokens(text)
    }

    /// The token that stands behind every text.
    pub(crate) fn end(&self) -> u32 {
        self.end
    }

    /// Length of every encoded text: 77.
    pub fn length(&self) -> usize {
        self.length
    }

    /// One more than the largest id, the rows that the token embedding needs.
    pub(crate) fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn tokens(&self, text: &str) -> Vec<u32> {
        // Every byte has its symbol, so no text can fail; an incomplete vocabulary gives unknown tokens.
        self.inner.encode_fast(text, false).map_or_else(|_| Vec::new(), |e| e.get_ids().to_vec())
    }
}

/// The reference's pipeline: NFC, one space for any whitespace, lower case; words; bytes; pairs.
fn build(
    vocab: Vocab,
    merges: Vec<(String, String)>,
    unknown: String,
    added: Vec<AddedToken>,
) -> tokenizers::Result<tokenizers::Tokenizer> {
    let pairs = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .continuing_subword_prefix(String::new())
        .end_of_word_suffix("</w>".into())
        .unk_token(unknown)
        .build()?;
    let space = Replace::new(ReplacePattern::Regex(r"\s+".into()), " ")?;
    let words = Split::new(SplitPattern::Regex(WORDS.into()), SplitDelimiterBehavior::Removed, true)?;
    let bytes = ByteLevel::default().add_prefix_space(false);
    let mut inner = tokenizers::Tokenizer::new(pairs);
    inner.with_normalizer(Some(Normalizers::new(vec![NFC.into(), space.into(), Lowercase.into()])))?;
    inner.with_pre_tokenizer(Some(PreTokenizers::new(vec![words.into(), bytes.into()])));
    inner.add_tokens(added)?;
    Ok(inner)
}

/// What the small files beside the vocabulary say.
struct TokenizerSettings {
    special: BTreeMap<&'static str, AddedToken>,
    /// Tokens of the newer `added_tokens_decoder`, by id.
    decoder: BTreeMap<u32, AddedToken>,
    length: usize,
}

impl TokenizerSettings {
    fn read(dir: &Path) -> Result<TokenizerSettings> {
        let path = dir.join("tokenizer_config.json");
        let mut config = read_object(&path)?.unwrap_or_default();
        let bad = |what: String| Error::file(&path, what);
        let mut decoder = BTreeMap::new();
        if let Some(Value::Object(entries)) = config.get("added_tokens_decoder") {
            for (id, token) in entries {
                let id = id.parse().map_err(|_| bad(format!("added_tokens_decoder has the id `{id}`")))?;
                decoder.insert(id, added_token(token).map_err(&bad)?);
            }
        } else if let Some(map) = read_object(&dir.join("special_tokens_map.json"))? {
            config.extend(map); // the older file wins, as in the reference
        }
        let mut special = BTreeMap::new();
        for (key, default) in SPECIAL {
            let token = match config.get(key) {
                None | Some(Value::Null) => AddedToken::from(default, true),
                Some(value) => added_token(value).map_err(|what| bad(format!("{key} {what}")))?,
            };
            special
                .insert(key, decoder.values().find(|t| t.content == token.content).cloned().unwrap_or(token));
        }
        let length = match config.get("model_max_length").and_then(Value::as_f64) {
            Some(n) if (3.0..=4096.).contains(&n) => n as usize,
            Some(n) if n < 3. => return Err(bad(format!("model_max_length is {n}; at least 3 is wanted"))),
            _ => LENGTH, // absent, or 1e30, the reference's word for absent
        };
        Ok(TokenizerSettings { special, decoder, length })
    }

    /// The tokens to register, in the reference's order: where one text is registered twice, the later form stays.
    fn added(&self) -> Vec<AddedToken> {
        let new = |t: &&AddedToken| !self.decoder.values().any(|d| d.content == t.content);
        let special = SPECIAL.iter().map(|(key, _)| &self.special[key]);
        self.decoder.values().chain(special.filter(new)).cloned().collect()
    }
}

/// A special token, written as a string or as an object; special tokens are matched before the text is normalised
/// unless the object says otherwise.
fn added_token(value: &Value) -> Result<AddedToken, String> {
    let flag = |name: &str, default| value.get(name).and_then(Value::as_bool).unwrap_or(default);
    let content = value.as_str().or_else(|| value.get("content")?.as_str());
    let content = content.ok_or_else(|| format!("is {value}; a token is wanted"))?;
    Ok(AddedToken::from(content, true)
        .normalized(flag("normalized", false))
        .lstrip(flag("lstrip", false))
        .rstrip(flag("rstrip", false))
        .single_word(flag("single_word", false)))
}

fn read_text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|e| Error::io(path, "cannot be read", e))
}

fn read_object(path: &Path) -> Result<Option<Map<String, Value>>> {
    if !path.exists() {
        return Ok(None);
    }
    let object = serde_json::from_str(&read_text(path)?);
    object.map(Some).map_err(|e| Error::file_from(path, format!("is not a JSON object: {e}"), e))
}

fn read_vocab(path: &Path) -> Result<Vocab> {
    let vocab: BTreeMap<String, u32> = serde_json::from_str(&read_text(path)?)
        .map_err(|e| Error::file_from(path, format!("is not a JSON object of token numbers: {e}"), e))?;
    Ok(vocab.into_iter().collect())
}

/// The pairs to merge, the most frequent first; after an optional `#version` line two symbols a line.
fn read_merges(path: &Path) -> Result<Vec<(String, String)>> {
    let text = read_text(path)?;
    let lines =
        text.lines().enumerate().filter(|(_, line)| !line.starts_with("#version") && !line.is_empty());
    lines
        .map(|(i, line)| match line.split(' ').collect::<Vec<_>>()[..] {
            [a, b] => Ok((a.to_owned(), b.to_owned())),
            _ => Err(Error::file(path, format!("line {}: two symbols are wanted, got `{line}`", i + 1))),
        })
        .collect()
}
