//! Signed URLs of the local store, which has no server of its own to sign them.
//!
//! The signature covers everything that the file route uses: key, size, hash and expiry. So the route needs no row, and
//! what it sends is still verified.

use hmac::{Hmac, Mac};
use jiff::Timestamp;
use secrecy::{ExposeSecret, SecretString};
use sha2::Sha256;

use super::key::Key;
use crate::job::Object;

/// Why a URL is rejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadLink {
    /// The signature is invalid.
    #[error("the link is not one of ours")]
    Forged,
    /// It has expired.
    #[error("the link has expired")]
    Expired,
}

/// The query of an object's URL.
pub(super) fn query(secret: &SecretString, object: &Object, expires: i64) -> String {
    let signature = hex(&mac(secret, object, expires).finalize().into_bytes());
    let Object { size, sha256, .. } = object;
    format!("expires={expires}&size={size}&sha256={sha256}&signature={signature}")
}

/// The object of a valid URL.
pub(super) fn verify(
    secret: &SecretString,
    key: &str,
    query: &str,
    now: Timestamp,
) -> Result<Object, BadLink> {
    let (object, expires, signature) = parse(key, query).ok_or(BadLink::Forged)?;
    // Compares in constant time.
    mac(secret, &object, expires).verify_slice(&signature).map_err(|_| BadLink::Forged)?;
    if now.as_second() >= expires { Err(BadLink::Expired) } else { Ok(object) }
}

fn parse(key: &str, query: &str) -> Option<(Object, i64, Vec<u8>)> {
    let key = Key::parse(key)?;
    let mut fields = query.split('&');
    let mut field = |name: &str| fields.next()?.strip_prefix(name)?.strip_prefix('=');
    let expires = field("expires")?.parse().ok()?;
    let size = field("size")?.parse().ok()?;
    let sha256 = field("sha256")?.to_owned();
    let signature = unhex(field("signature")?)?;
    fields.next().is_none().then(|| (key.object(size, sha256), expires, signature))
}

fn mac(secret: &SecretString, object: &Object, expires: i64) -> Hmac<Sha256> {
    let mut mac =
        Hmac::new_from_slice(secret.expose_secret().as_bytes()).expect("HMAC takes keys of any length");
    let Object { key, size, sha256, .. } = object;
    mac.update(format!("hypnos file\n{key}\n{expires}\n{size}\n{sha256}").as_bytes());
    mac
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(2 * bytes.len());
    for nibble in bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]) {
        text.push(char::from(b"0123456789abcdef"[usize::from(nibble)]));
    }
    text
}

pub(super) fn unhex(text: &str) -> Option<Vec<u8>> {
    let (pairs, odd) = text.as_bytes().as_chunks::<2>();
    let nibble = |byte: u8| (byte as char).to_digit(16);
    let byte = |&[high, low]: &[u8; 2]| Some((nibble(high)? * 16 + nibble(low)?) as u8);
    if odd.is_empty() { pairs.iter().map(byte).collect() } else { None }
}
