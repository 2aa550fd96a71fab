//! What a listing of the object store returns.

use std::path::PathBuf;

use super::key::Key;

/// A listed object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its key.
    pub key: Key,
    /// Its size in bytes.
    pub size: u64,
    /// When it was written, by the store's clock.
    pub modified_ms: i64,
}

/// The contents of a store.
#[derive(Clone, Debug, Default)]
pub struct Listing {
    /// Objects with valid keys.
    pub entries: Vec<Entry>,
    /// Keys that this program cannot have written, such as a folder's marker or one with a doubled slash. They are
    /// never removed.
    pub foreign: Vec<String>,
    /// Unfinished files of uploads to a directory.
    pub(super) unfinished: Vec<PathBuf>,
}
