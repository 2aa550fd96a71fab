//! Text to the token numbers that the text encoder reads, as many as the files say: 77 in Stable Diffusion.
//!
//! CLIP's byte-pair encoding (Radford et al. 2021, arXiv 2103.00020, section 2.4), put together as `transformers` 5.23.0
//! does in `models/clip/tokenization_clip.py` and `tokenization_utils_tokenizers.py`, from any of the files that it and
//! its predecessors write (`files.rs`, `added.rs`). The encoding itself is the reference's own crate. There is no decoding.

mod added;
mod files;
mod object;

use std::collections::BTreeSet;
use std::path::Path;

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence as Normalizers, replace::ReplacePattern};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use self::files::Files;
use super::{Error, Result};

/// What CLIP takes for a word: its own marks, English endings, runs of letters, single digits, runs of the rest.
const WORDS: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// CLIP's tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    start: u32,
    end: u32,
    pad: u32,
    unknown: Option<u32>,
    length: usize,
    truncates_left: bool,
    pads_left: bool,
    vocab_size: usize,
}

impl Tokenizer {
    /// Reads `tokenizer.json`, or `vocab.json` and `merges.txt`, and the small files beside them where they exist.
    /// [`Error::File`] names the file, and the line where there is one.
    pub fn open(dir: &Path) -> Result<Tokenizer> {
        let Files { vocab, merges, added, length, truncates_left, pads_left, splits_special } =
            Files::read(dir)?;
        let bad = |what: String| Error::file(dir, what);
        // Departure: the reference numbers such a token anew, and no text encoder has a row for it.
        let known = |text: &str| vocab.contains_key(text) || added.is_numbered(text);
        for (key, text) in [("bos_token", &added.start), ("eos_token", &added.end), ("pad_token", &added.pad)]
        {
            if !known(text) {
                return Err(bad(format!("the vocabulary has no `{text}`, the {key}")));
            }
        }
        let symbols = || ByteLevel::alphabet().into_iter().flat_map(|c| [c.to_string(), format!("{c}</w>")]);
        if !known(&added.unknown) && symbols().any(|symbol| !vocab.contains_key(&symbol)) {
            let what =
                format!("the vocabulary lacks symbols of bytes, and `{}` to stand for them", added.unknown);
            return Err(bad(what));
        }
        let largest = vocab.values().max().copied();
        let mut inner =
            build(vocab, merges, added.unknown.clone(), added.tokens).map_err(|e| bad(e.to_string()))?;
        inner.set_encode_special_tokens(splits_special);
        let id = |text: &str| inner.token_to_id(text).ok_or_else(|| bad(format!("has no token `{text}`")));
        let (start, end, pad) = (id(&added.start)?, id(&added.end)?, id(&added.pad)?);
        let unknown = inner.token_to_id(&added.unknown);
        let on_top = inner.get_added_tokens_decoder().into_keys();
        let vocab_size = on_top.chain(largest).max().map_or(0, |id| id as usize + 1);
        Ok(Tokenizer { inner, start, end, pad, unknown, length, truncates_left, pads_left, vocab_size })
    }

    /// The ids of a text, exactly [`Tokenizer::length`] of them: start, the text's tokens as far as they fit, end,
    /// then padding (before it, if the files say so).
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let (tokens, room) = (self.tokens(text), self.length - 2);
        let cut = tokens.len().saturating_sub(room);
        let kept = if self.truncates_left { &tokens[cut..] } else { &tokens[..tokens.len() - cut] };
        let padding = vec![self.pad; room - kept.len()];
        let text = [&[self.start], kept, &[self.end]].concat();
        if self.pads_left { [padding, text].concat() } else { [text, padding].concat() }
    }

    /// How many tokens a text has, without start and end. Beyond [`Tokenizer::length`] - 2 they are cut off.
    pub fn count(&self, text: &str) -> usize {
        self.tokens(text).len()
    }

    /// The one token that a word is, if it is one; asked of rare tokens, so start, end, padding and unknown do not count.
    pub fn id(&self, word: &str) -> Option<u32> {
        let marks = [Some(self.start), Some(self.end), Some(self.pad), self.unknown];
        match self.tokens(word)[..] {
            [token] if !marks.contains(&Some(token)) => Some(token),
            _ => None,
        }
    }

    /// Whether a word is one token of the vocabulary.
    pub fn is_single_token(&self, word: &str) -> bool {
        self.id(word).is_some()
    }

    /// All words of ASCII letters and digits that are one token each, as [`Tokenizer::is_single_token`] says, sorted.
    pub fn whole_words(&self) -> Vec<String> {
        let vocab = self.inner.get_vocab(true);
        let words: BTreeSet<&str> =
            vocab.keys().map(|token| token.strip_suffix("</w>").unwrap_or(token)).collect();
        let plain = |word: &&str| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_alphanumeric());
        let words = words.into_iter().filter(plain).filter(|word| self.is_single_token(word));
        words.map(ToOwned::to_owned).collect()
    }

    /// Whether a token came on top of the vocabulary, as special tokens and placeholders do.
    pub fn is_added(&self, id: u32) -> bool {
        self.inner.get_added_vocabulary().get_added_tokens_decoder().contains_key(&id)
    }

    /// The tokens of a text, without start and end, all of them.
    pub(crate) fn words(&self, text: &str) -> Vec<u32> {
        self.tokens(text)
    }

    /// The token that stands behind every text.
    pub(crate) fn end(&self) -> u32 {
        self.end
    }

    /// The token that fills texts up.
    pub(crate) fn pad(&self) -> u32 {
        self.pad
    }

    /// Length of every encoded text, as the files say: 77 in Stable Diffusion.
    pub fn length(&self) -> usize {
        self.length
    }

    /// One more than the largest id, the rows that the token embedding needs.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn tokens(&self, text: &str) -> Vec<u32> {
        // Every byte has its symbol or an unknown token for it, so no text can fail.
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
