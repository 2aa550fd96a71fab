//! API keys: generated, parsed, and checked against the database through a cache.
//!
//! A key is `hyp_<id>_<secret><checksum>`. The checksum rejects typing errors without a query, the id finds the row,
//! and the row holds only a SHA-256 of the secret: it has 131 random bits, so no slow hash is needed.

use std::time::Duration;

use moka::sync::Cache;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::problem::{Kind, Problem};
use crate::blobs::hex;
use crate::store::{self, Store, TenantState};

const BASE62: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
const PREFIX: &str = "hyp_";
const ID_CHARS: usize = 12;
const SECRET_CHARS: usize = 22; // 131 bits
const CHECKSUM_CHARS: usize = 6; // 32 bits
const KEY_CHARS: usize = PREFIX.len() + ID_CHARS + 1 + SECRET_CHARS + CHECKSUM_CHARS;

const CACHED_MAX: u64 = 10_000;
const LOOKUPS_MAX: usize = 8;

/// A new key: shown once, stored as its hash.
#[derive(Debug)]
pub struct NewApiKey {
    /// The public part, by which it is listed and revoked.
    pub id: String,
    /// The whole key, to be shown once.
    pub text: String,
    /// SHA-256 of the secret, lower-case hexadecimal.
    pub hash: String,
}

/// Generates a key from the system's random numbers.
pub fn make_key() -> Result<NewApiKey, getrandom::Error> {
    let id = random_text(ID_CHARS)?;
    let secret = random_text(SECRET_CHARS)?;
    let body = format!("{PREFIX}{id}_{secret}");
    let text = format!("{body}{}", checksum(&body));
    Ok(NewApiKey { id, text, hash: hash(&secret) })
}

fn random_text(chars: usize) -> Result<String, getrandom::Error> {
    let mut text = String::new();
    while text.len() < chars {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes)?;
        // 248 is the largest multiple of 62 in a byte: larger bytes would make some letters more likely.
        let fair = bytes.iter().filter(|&&byte| byte < 248);
        let letters = fair.map(|&byte| char::from(BASE62[usize::from(byte % 62)]));
        text.extend(letters.take(chars - text.len()));
    }
    Ok(text)
}

fn checksum(text: &str) -> String {
    let mut rest = crc32fast::hash(text.as_bytes()) as usize;
    let mut letters = [0; CHECKSUM_CHARS];
    for letter in letters.iter_mut().rev() {
        *letter = BASE62[rest % 62];
        rest /= 62;
    }
    letters.iter().map(|&letter| char::from(letter)).collect()
}

fn hash(secret: &str) -> String {
    hex(&Sha256::digest(secret))
}

/// The id and the secret of a key whose checksum is right.
fn parse(text: &str) -> Option<(&str, &str)> {
    let rest = text.strip_prefix(PREFIX)?;
    if text.len() != KEY_CHARS || !rest.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
        return None;
    }
    let (body, sum) = text.split_at(text.len() - CHECKSUM_CHARS);
    let (id, secret) = rest[..rest.len() - CHECKSUM_CHARS].split_once('_')?;
    (id.len() == ID_CHARS && checksum(body) == sum).then_some((id, secret))
}

/// Looks keys up in the database, and caches them for a short time.
pub(super) struct KeyCache {
    store: Store,
    cached: Cache<String, CachedKey>,
    /// Limits lookups, so that invented keys do not load the database; cached keys need none.
    lookups: Semaphore,
}

/// A key as it was looked up.
#[derive(Clone)]
pub(super) struct CachedKey {
    pub(super) key: store::Key,
    /// When it expires, if it does.
    pub(super) expires_at: Option<Instant>,
}

impl KeyCache {
    pub(super) fn new(store: Store, time: Duration) -> Self {
        let cached = Cache::builder().max_capacity(CACHED_MAX).time_to_live(time).build();
        Self { store, cached, lookups: Semaphore::new(LOOKUPS_MAX) }
    }

    /// Looks a key up and checks its secret, expiry and tenant.
    pub(super) async fn authenticate(&self, text: &str) -> Result<CachedKey, Problem> {
        let (id, secret) = parse(text).ok_or_else(unauthorized)?;
        let found = if let Some(found) = self.cached.get(id) {
            found
        } else {
            let _lookup = self.lookups.acquire().await.map_err(|error| Problem::internal(&error))?;
            let queried_at = Instant::now();
            let key = self.store.find_key(id).await?.filter(|key| key.live).ok_or_else(unauthorized)?;
            // The database computed the remaining time by its own clock, after it was queried.
            let remaining = key.left_ms.map(|ms| Duration::from_millis(ms.max(0) as u64));
            let found = CachedKey {
                key,
                expires_at: remaining.and_then(|remaining| queried_at.checked_add(remaining)),
            };
            self.cached.insert(id.to_owned(), found.clone());
            found
        };
        let matches = bool::from(hash(secret).as_bytes().ct_eq(found.key.hash.as_bytes()));
        let expired = found.expires_at.is_some_and(|expires_at| expires_at <= Instant::now());
        match found.key.tenant_state {
            _ if !matches || expired => Err(unauthorized()),
            TenantState::Active => Ok(found),
            TenantState::Disabled | TenantState::Deleting => Err(Problem::tenant_disabled()),
        }
    }
}

pub(super) fn unauthorized() -> Problem {
    Problem::new(Kind::Unauthorized, "send a valid API key as `Authorization: Bearer hyp_...`")
}

/// Whether a query contains a whole key, escaped or not. A prefix of one may be an ordinary value.
pub(super) fn contains_key(query: &str) -> bool {
    let decoded = percent_decoded(query);
    let mut candidates = decoded.match_indices(PREFIX);
    candidates.any(|(at, _)| decoded.get(at..at + KEY_CHARS).is_some_and(|text| parse(text).is_some()))
}

/// The query with its percent escapes decoded.
fn percent_decoded(query: &str) -> String {
    let mut bytes = Vec::with_capacity(query.len());
    let mut rest = query.as_bytes();
    while let [byte, after @ ..] = rest {
        let escaped = (*byte == b'%').then(|| std::str::from_utf8(after.get(..2)?).ok()).flatten();
        let escaped = escaped.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        bytes.push(escaped.unwrap_or(*byte));
        rest = if escaped.is_some() { &after[2..] } else { after };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_made_key_is_read_back_and_no_key_with_one_other_letter_is() {
        let key = make_key().expect("random numbers");
        let (id, secret) = parse(&key.text).expect("a key");
        assert_eq!((id, hash(secret)), (key.id.as_str(), key.hash.clone()));
        for at in 0..key.text.len() {
            let other = if &key.text[at..=at] == "x" { "y" } else { "x" };
            let mut text = key.text.clone();
            text.replace_range(at..=at, other);
            assert_eq!(parse(&text), None, "{at}");
        }
        assert_ne!(make_key().expect("random numbers").text, key.text);
    }

    #[test]
    fn a_query_holds_a_key_only_if_it_is_a_whole_one() {
        let key = make_key().expect("random numbers").text;
        let escaped = key.replace('_', "%5F").replace('h', "%68");
        for query in [
            format!("key={key}"),
            format!("a=b&x{key}y=1"),
            format!("hyp_&k=hyp_{key}"),
            format!("k={escaped}"),
        ] {
            assert!(contains_key(&query), "{query}");
        }
        for query in [
            "class_name=hyp_x",
            "class_name=hyp_",
            "%",
            "%zz=%6",
            "hyp_\u{e9}",
            &key[1..],
            &key[..key.len() - 1],
        ] {
            assert!(!contains_key(query), "{query}");
        }
    }
}
