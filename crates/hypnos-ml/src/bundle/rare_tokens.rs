//! Words that mean next to nothing to a model, for a training to give a meaning to.

use std::collections::BTreeSet;

use super::directory::Bundle;
use super::manifest::Manifest;
use crate::tokenizer::Tokenizer;

/// Words that mean next to nothing to Stable Diffusion 1.x, in the order in which trainings take them where a bundle
/// names none itself. All but the last three are one token of CLIP's vocabulary; those are in ours.
///
/// Assumption: these. DreamBooth (Ruiz et al. 2022, arXiv 2208.12242, section 3.2) asks for rare words of one short
/// token; `sks` is what its first users took.
const CANDIDATES: [&str; 9] = ["sks", "ohwx", "olis", "phol", "hta", "dits", "zwx", "xjy", "qvk"];

/// What to say of a tokenizer that has fewer than two of them.
pub(super) const NO_RARE_TOKENS: &str = "has fewer than two rare tokens: a training has to be given instance_token, and \
    background_token if it makes views";

impl Bundle {
    /// The words that a training gives a meaning to unless it is given others: one token each, and no two the same.
    /// Those that `hypnos.json` names, or else those of a fixed list that are words of `tokenizer`'s vocabulary (no
    /// special tokens and no placeholders). The word for the product that the bundle has learned is none of them.
    pub fn rare_tokens(&self, tokenizer: &Tokenizer) -> Vec<String> {
        rare_tokens(self.manifest(), tokenizer)
    }

    /// What cannot be done if there are fewer than two of them, to be put after the name of `tokenizer/`.
    pub fn rare_tokens_missing(&self, tokenizer: &Tokenizer) -> Option<&'static str> {
        (self.rare_tokens(tokenizer).len() < 2).then_some(NO_RARE_TOKENS)
    }
}

/// See [`Bundle::rare_tokens`].
pub(super) fn rare_tokens(manifest: &Manifest, tokenizer: &Tokenizer) -> Vec<String> {
    let learned = manifest.product.as_ref().map(|product| product.token.as_str());
    let named: Vec<&str> = manifest.rare_tokens.iter().map(String::as_str).collect();
    // A bundle may name a placeholder of its own.
    let (words, may_be_added) = if named.is_empty() { (&CANDIDATES[..], false) } else { (&named[..], true) };
    let mut taken = BTreeSet::new();
    let rare = |word: &&&str| {
        let id = tokenizer.id(word).filter(|id| may_be_added || !tokenizer.is_added(*id));
        Some(**word) != learned && id.is_some_and(|id| taken.insert(id))
    };
    words.iter().filter(rare).map(|word| (*word).to_owned()).collect()
}
