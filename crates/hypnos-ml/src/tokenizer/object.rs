//! JSON objects in the order of their file.

use std::collections::HashMap;
use std::path::Path;

use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::Value;

use crate::{Error, Result};

/// Values by their keys, in the order in which the keys came: where the files give a new token no number, their order
/// does.
#[derive(Debug)]
pub(super) struct Ordered<V> {
    entries: Vec<(String, V)>,
    /// Where each key's entry is.
    places: HashMap<String, usize>,
}

/// A JSON object.
pub(super) type Object = Ordered<Value>;

impl<V> Default for Ordered<V> {
    fn default() -> Self {
        Self { entries: Vec::new(), places: HashMap::new() }
    }
}

impl<V> Ordered<V> {
    pub(super) fn get(&self, key: &str) -> Option<&V> {
        self.places.get(key).map(|i| &self.entries[*i].1)
    }

    /// Puts the value in the place of the one before; behind the others if there is none.
    pub(super) fn set(&mut self, key: String, value: V) {
        if let Some(i) = self.places.get(&key) {
            self.entries[*i].1 = value;
        } else {
            self.places.insert(key.clone(), self.entries.len());
            self.entries.push((key, value));
        }
    }

    pub(super) fn remove(&mut self, key: &str) -> Option<V> {
        let i = self.places.remove(key)?;
        self.places.values_mut().filter(|place| **place > i).for_each(|place| *place -= 1);
        Some(self.entries.remove(i).1)
    }

    pub(super) fn values(&self) -> impl Iterator<Item = &V> + Clone {
        self.entries.iter().map(|(_, value)| value)
    }

    pub(super) fn into_entries(self) -> Vec<(String, V)> {
        self.entries
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_takes_the_place_of_the_one_before() {
        let mut object = Ordered::default();
        ["a", "b", "c", "b"].into_iter().zip(0..).for_each(|(key, i)| object.set(key.into(), i));
        assert_eq!((object.remove("a"), object.remove("a")), (Some(0), None));
        object.set("c".into(), 4);
        object.set("a".into(), 5);
        assert_eq!((object.get("b"), object.get("d")), (Some(&3), None));
        assert_eq!(object.into_entries(), [("b".into(), 3), ("c".into(), 4), ("a".into(), 5)]);
    }

    /// If each key were compared with all others, this test would take minutes.
    #[test]
    fn half_a_million_keys_keep_their_order() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let entries: Vec<String> = (0..500_000).map(|i| format!("\"<token-{i:06}>\": {i}")).collect();
        std::fs::write(file.path(), format!("{{{}}}", entries.join(","))).unwrap();
        let entries = Object::read(file.path()).unwrap().unwrap().into_entries();
        assert_eq!((entries.len(), entries[499_999].0.as_str()), (500_000, "<token-499999>"));
    }
}
