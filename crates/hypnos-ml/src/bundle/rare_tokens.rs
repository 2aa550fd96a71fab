//! Words to be given a meaning by a training.

use std::collections::BTreeSet;

use super::directory::Bundle;
use super::manifest::Manifest;
use crate::tokenizer::Tokenizer;

/// Words that mean next to nothing to Stable Diffusion 1.x, in the order in which they are taken where a bundle names
/// none itself. Those that are several tokens of the vocabulary at hand are passed over: CLIP's has all but the last three,
/// which random bundles have.
///
/// Assumption: these. DreamBooth (Ruiz et al. 2022, arXiv 2208.12242, section 3.2) asks for words of one token, rare and
/// short, that no picture was described with; `sks` is what its users took first.
const CANDIDATES: [&str; 9] = ["sks", "ohwx", "olis", "phol", "hta", "dits", "zwx", "xjy", "qvk"];

/// What to say of a tokenizer that has fewer than two of them.
pub(super) const NO_RARE_TOKENS: &str = "has fewer than two rare tokens: a training has to be given instance_token, and \
    background_token if it makes views";

impl Bundle {
    /// Words of one token each that mean next to nothing: those that `hypnos.json` names, or else those of a fixed list
    /// that are words of `tokenizer`'s vocabulary (no special tokens and no placeholders), no two of them the same token.
    pub fn rare_tokens(&self, tokenizer: &Tokenizer) -> Vec<String> {
        rare_tokens(self.manifest(), tokenizer)
    }
}

/// See [`Bundle::rare_tokens`].
pub(super) fn rare_tokens(manifest: &Manifest, tokenizer: &Tokenizer) -> Vec<String> {
    if !manifest.rare_tokens.is_empty() {
        return manifest.rare_tokens.clone();
    }
    let mut taken = BTreeSet::new();
    let rare = |word: &&str| tokenizer.id(word).is_some_and(|id| !tokenizer.is_added(id) && taken.insert(id));
    CANDIDATES.into_iter().filter(rare).map(str::to_owned).collect()
}
