//! The words that models know, cached.

use std::collections::HashSet;
use std::sync::Arc;

use moka::sync::Cache;

use super::problem::Problem;
use crate::store::Store;

/// Vocabularies that are kept in memory.
const VOCABULARIES_MAX: u64 = 16;

/// The vocabularies of models, cached: a model's never changes.
pub(super) struct Vocabularies(Cache<String, Arc<HashSet<String>>>);

impl Vocabularies {
    pub(super) fn new() -> Self {
        Self(Cache::new(VOCABULARIES_MAX))
    }

    /// The words that are one token each of the model with this hash; none if no worker has registered it.
    pub(super) async fn get(&self, store: &Store, sha256: &str) -> Result<Arc<HashSet<String>>, Problem> {
        if let Some(words) = self.0.get(sha256) {
            return Ok(words);
        }
        let words = store.model_words(sha256).await?.unwrap_or_default();
        let words: Arc<HashSet<String>> = Arc::new(words.split_whitespace().map(ToOwned::to_owned).collect());
        self.0.insert(sha256.to_owned(), words.clone());
        Ok(words)
    }
}
