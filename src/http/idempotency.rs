//! `Idempotency-Key`: a request that is sent twice makes one job.

use axum::http::HeaderMap;
use sha2::{Digest, Sha256};

use super::problem::{Kind, Problem};
use crate::store::Idempotency;

const KEY_CHARS_MAX: usize = 255;

/// The request's `Idempotency-Key`, if it has one.
pub(super) fn idempotency_key(headers: &HeaderMap) -> Result<Option<&str>, Problem> {
    let mut keys = headers.get_all("idempotency-key").iter();
    let Some(key) = keys.next() else { return Ok(None) };
    let key = key.to_str().ok().filter(|key| {
        (1..=KEY_CHARS_MAX).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_graphic())
    });
    if let (Some(key), None) = (key, keys.next()) {
        return Ok(Some(key));
    }
    let detail = format!("Idempotency-Key: wanted one, of 1 to {KEY_CHARS_MAX} visible ASCII characters");
    Err(Problem::new(Kind::BadParameter, detail))
}

/// The request's `Idempotency-Key` with the hash of the request; none without a key. `parts` are all of its contents,
/// in an order that does not depend on the sender.
pub(super) fn idempotency<'a>(
    headers: &HeaderMap,
    parts: impl IntoIterator<Item = &'a [u8]>,
) -> Result<Option<Idempotency>, Problem> {
    let Some(key) = idempotency_key(headers)? else { return Ok(None) };
    let mut request = RequestHash::default();
    parts.into_iter().for_each(|part| request.add(part));
    Ok(Some(request.with_key(key)))
}

/// A hash of a request's contents.
#[derive(Default)]
pub(super) struct RequestHash(Sha256);

impl RequestHash {
    /// Adds the next part.
    pub(super) fn add(&mut self, part: &[u8]) {
        self.0.update((part.len() as u64).to_le_bytes());
        self.0.update(part);
    }

    /// Adds the next part, which is `bytes` long, without reading all of it into memory.
    pub(super) fn add_from(&mut self, bytes: u64, mut part: impl std::io::Read) -> std::io::Result<()> {
        self.0.update(bytes.to_le_bytes());
        let mut buffer = vec![0; 256 << 10];
        loop {
            match part.read(&mut buffer)? {
                0 => return Ok(()),
                n => self.0.update(&buffer[..n]),
            }
        }
    }

    /// The hash with the request's `Idempotency-Key`.
    pub(super) fn with_key(self, key: &str) -> Idempotency {
        Idempotency { key: key.to_owned(), request_hash: format!("{:x}", self.0.finalize()) }
    }
}
