//! `Idempotency-Key`: what makes the same request, sent twice, one job.

use axum::http::HeaderMap;
use sha2::{Digest, Sha256};

use super::problem::{Kind, Problem};
use crate::store::Idempotency;

const KEY_CHARS_MAX: usize = 255;

/// The `Idempotency-Key` that a client gave its request, if it did.
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

/// What makes the same request, sent twice, one job; none without an `Idempotency-Key`. `parts` are all that is asked
/// for, in an order that does not depend on the sender.
pub(super) fn idempotency<'a>(
    headers: &HeaderMap,
    parts: impl IntoIterator<Item = &'a [u8]>,
) -> Result<Option<Idempotency>, Problem> {
    let Some(key) = idempotency_key(headers)? else { return Ok(None) };
    let mut request = RequestHash::default();
    parts.into_iter().for_each(|part| request.add(part));
    Ok(Some(request.with_key(key)))
}

/// A hash of all that is asked for.
#[derive(Default)]
pub(super) struct RequestHash(Sha256);

impl RequestHash {
    /// Adds the next part.
    pub(super) fn add(&mut self, part: &[u8]) {
        self.0.update((part.len() as u64).to_le_bytes());
        self.0.update(part);
    }

    /// Adds the next part, which is `bytes` long and read piece by piece.
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

    /// The request of this hash under its name.
    pub(super) fn with_key(self, key: &str) -> Idempotency {
        Idempotency { key: key.to_owned(), request_hash: format!("{:x}", self.0.finalize()) }
    }
}
