//! A byte-bounded cache: the least recently used values leave first.

use std::sync::Arc;

/// Keeps values by a key, up to a number of bytes. One value may be larger than the bound; it is then alone.
#[derive(Debug)]
pub(super) struct LruCache<T> {
    bytes_max: u64,
    /// Key, bytes, value; the most recently used last.
    held: Vec<(String, u64, Arc<T>)>,
}

impl<T> LruCache<T> {
    pub(super) fn new(bytes_max: u64) -> Self {
        Self { bytes_max, held: Vec::new() }
    }

    /// Keeps up to so many bytes from now on.
    pub(super) fn bound(&mut self, bytes_max: u64) {
        self.bytes_max = bytes_max;
        self.make_room(0);
    }

    pub(super) fn get(&mut self, key: &str) -> Option<Arc<T>> {
        let found = self.held.remove(self.held.iter().position(|(held, ..)| held == key)?);
        let value = Arc::clone(&found.2);
        self.held.push(found);
        Some(value)
    }

    /// Drops values until `bytes` more fit. Called before a value is made, so that old and new are never both in
    /// memory.
    pub(super) fn make_room(&mut self, bytes: u64) {
        let room = self.bytes_max.saturating_sub(bytes);
        while self.bytes() > room {
            self.held.remove(0);
        }
    }

    pub(super) fn put(&mut self, key: &str, bytes: u64, value: T) -> Arc<T> {
        self.make_room(bytes);
        let value = Arc::new(value);
        self.held.push((key.to_owned(), bytes, Arc::clone(&value)));
        value
    }

    fn bytes(&self) -> u64 {
        self.held.iter().map(|(_, bytes, _)| bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(cache: &LruCache<()>) -> Vec<&str> {
        cache.held.iter().map(|(key, ..)| key.as_str()).collect()
    }

    #[test]
    fn the_least_recently_used_leave_when_there_is_no_room() {
        let mut cache = LruCache::new(10);
        for key in ["a", "b", "c"] {
            cache.put(key, 3, ());
        }
        assert!(cache.get("a").is_some());
        cache.put("d", 3, ());
        assert_eq!(keys(&cache), ["c", "a", "d"]);
        assert!(cache.get("b").is_none());
        cache.put("e", 7, ());
        assert_eq!((keys(&cache), cache.bytes()), (vec!["d", "e"], 10));
    }

    #[test]
    fn a_lower_bound_drops_what_no_longer_fits() {
        let mut cache = LruCache::new(10);
        cache.put("a", 4, ());
        cache.put("b", 4, ());
        cache.bound(5);
        assert_eq!(keys(&cache), ["b"]);
        cache.bound(10);
        cache.put("c", 6, ());
        assert_eq!(keys(&cache), ["b", "c"]);
    }

    #[test]
    fn one_value_may_be_larger_than_the_cache_and_is_then_alone() {
        let mut cache = LruCache::new(10);
        cache.put("a", 3, ());
        cache.put("b", 11, ());
        assert_eq!(keys(&cache), ["b"]);
        cache.put("c", 1, ());
        assert_eq!(keys(&cache), ["c"]);
    }

    #[test]
    fn room_is_made_before_the_value_is_there() {
        let mut cache = LruCache::new(10);
        cache.put("a", 6, ());
        cache.make_room(5);
        assert_eq!(cache.bytes(), 0);
    }
}
