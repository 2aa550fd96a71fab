//! JSON objects in the order of their file.

use std::path::Path;

use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::Value;

use crate::{Error, Result};

/// A JSON object that keeps the order of its keys: where the files give a new token no number, their order does.
#[derive(Debug, Default)]
pub(super) struct Object(Vec<(String, Value)>);

impl Object {
    /// The object in a file; `None` if there is no such file.
    pub(super) fn read(path: &Path) -> Result<Option<Self>> {
        if !path.exists() {
            return Ok(None);
        }
        let text = read_text(path)?;
        let mut parser = serde_json::Deserializer::from_str(&text);
        let object = parser.deserialize_map(Self::default()).and_then(|object| parser.end().map(|()| object));
        object.map(Some).map_err(|e| Error::file_from(path, format!("is not a JSON object: {e}"), e))
    }

    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.0.iter().find(|(name, _)| name == key).map(|(_, value)| value)
    }

    /// Puts the value in the place of the one before; behind the others if there is none.
    pub(super) fn set(&mut self, key: String, value: Value) {
        match self.0.iter_mut().find(|(name, _)| *name == key) {
            Some((_, old)) => *old = value,
            None => self.0.push((key, value)),
        }
    }

    pub(super) fn remove(&mut self, key: &str) -> Option<Value> {
        let i = self.0.iter().position(|(name, _)| name == key)?;
        Some(self.0.remove(i).1)
    }

    pub(super) fn into_entries(self) -> Vec<(String, Value)> {
        self.0
    }
}

impl<'de> Visitor<'de> for Object {
    type Value = Self;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> std::result::Result<Self, A::Error> {
        while let Some((key, value)) = map.next_entry()? {
            self.set(key, value);
        }
        Ok(self)
    }
}

pub(super) fn read_text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|e| Error::io(path, "cannot be read", e))
}
