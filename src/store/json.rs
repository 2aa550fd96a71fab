//! Columns that hold JSON.

use super::error::{Error, Result};

/// Reads a JSON column.
pub(super) fn parse<T: serde::de::DeserializeOwned>(column: &str, text: &str) -> Result<T> {
    // serde_json's own message may quote the document
    serde_json::from_str(text)
        .map_err(|_| Error::Corrupt(format!("column {column} holds no valid JSON document").into()))
}

/// The text of a JSON column.
pub(super) fn json<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("our documents have string keys and finite numbers or null")
}
