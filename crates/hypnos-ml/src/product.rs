//! The product that is learned: what prompts call it, and the placeholder that stands for it.

use serde::{Deserialize, Serialize};

/// What stands for the product in a prompt.
pub const PLACEHOLDER: &str = "{product}";

/// The words for one product.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Product {
    /// The word that means this one product, a single token: `[V]`.
    pub token: String,
    /// What kind of thing it is: `[C]`.
    pub class_name: String,
    /// Whether the class stands beside the token; a token that learned all of the product stands alone.
    #[serde(default = "yes")]
    pub with_class: bool,
}

fn yes() -> bool {
    true
}

impl Product {
    /// How prompts call it: `[V] [C]`, or `[V]`.
    pub(crate) fn words(&self) -> String {
        if self.with_class { format!("{} {}", self.token, self.class_name) } else { self.token.clone() }
    }

    /// A prompt with the product's words in the place of [`PLACEHOLDER`].
    pub fn named(&self, prompt: &str) -> String {
        prompt.replace(PLACEHOLDER, &self.words())
    }
}
