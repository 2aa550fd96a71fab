//! Things that are dear to make, kept while there is room: the least recently used leave first.

use std::sync::Arc;

/// Keeps things by a key, up to a number of bytes. One thing may be larger than the bound; it is then alone.
#[derive(Debug)]
pub(super) struct Shelf<T> {
    bytes_max: u64,
    /// Key, bytes, thing; the most recently used last.
    held: Vec<(String, u64, Arc<T>)>,
}

impl<T> Shelf<T> {
    pub(super) fn new(bytes_max: u64) -> Self {
        Self { bytes_max, held: Vec::new() }
    }

    pub(super) fn get(&mut self, key: &str) -> Option<Arc<T>> {
        let found = self.held.remove(self.held.iter().position(|(held, ..)| held == key)?);
        let thing = Arc::clone(&found.2);
        self.held.push(found);
        Some(thing)
    }

    /// Lets go of things until `bytes` more fit, before they are made: the old and the new never lie side by side.
    pub(super) fn make_room(&mut self, bytes: u64) {
        let room = self.bytes_max.saturating_sub(bytes);
        while self.bytes() > room {
            self.held.remove(0);
        }
    }

    pub(super) fn put(&mut self, key: &str, bytes: u64, thing: T) -> Arc<T> {
        self.make_room(bytes);
        let thing = Arc::new(thing);
        self.held.push((key.to_owned(), bytes, Arc::clone(&thing)));
        thing
    }

    fn bytes(&self) -> u64 {
        self.held.iter().map(|(_, bytes, _)| bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(shelf: &Shelf<()>) -> Vec<&str> {
        shelf.held.iter().map(|(key, ..)| key.as_str()).collect()
    }

    #[test]
    fn the_least_recently_used_leave_when_there_is_no_room() {
        let mut shelf = Shelf::new(10);
        for key in ["a", "b", "c"] {
            shelf.put(key, 3, ());
        }
        assert!(shelf.get("a").is_some());
        shelf.put("d", 3, ());
        assert_eq!(keys(&shelf), ["c", "a", "d"]);
        assert!(shelf.get("b").is_none());
        shelf.put("e", 7, ());
        assert_eq!((keys(&shelf), shelf.bytes()), (vec!["d", "e"], 10));
    }

    #[test]
    fn one_thing_may_be_larger_than_the_shelf_and_is_then_alone() {
        let mut shelf = Shelf::new(10);
        shelf.put("a", 3, ());
        shelf.put("b", 11, ());
        assert_eq!(keys(&shelf), ["b"]);
        shelf.put("c", 1, ());
        assert_eq!(keys(&shelf), ["c"]);
    }

    #[test]
    fn room_is_made_before_the_thing_is_there() {
        let mut shelf = Shelf::new(10);
        shelf.put("a", 6, ());
        shelf.make_room(5);
        assert_eq!(shelf.bytes(), 0);
    }
}
