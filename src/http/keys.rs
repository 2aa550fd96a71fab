//! Who asks: API keys, and what stands in for them on a server without.
//!
//! A key is `hyp_<id>_<secret><checksum>`. The checksum refuses typing errors without a query, the id finds the row,
//! and the row holds a SHA-256 of the secret only: it has 131 random bits, so nothing slower is needed.

use std::net::IpAddr;
use std::time::Duration;

use axum::extract::{FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::uri::Authority;
use axum::http::{HeaderMap, Uri, header};
use moka::sync::Cache;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::problem::{Kind, Problem};
use super::{Auth, Front};
use crate::blobs::hex;
use crate::job::TenantId;
pub use crate::store::Scope;
use crate::store::{self, Store, TenantState};

const BASE62: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
const PREFIX: &str = "hyp_";
const ID_CHARS: usize = 12;
const SECRET_CHARS: usize = 22; // 131 bits
const CHECKSUM_CHARS: usize = 6; // 32 bits

const BELIEVED_MAX: u64 = 10_000;

/// A new key: shown once, kept as its hash.
#[derive(Debug)]
pub struct MadeKey {
    /// The public part, by which it is listed and revoked.
    pub id: String,
    /// The whole, to be shown once.
    pub text: String,
    /// SHA-256 of the secret, lower-case hexadecimal.
    pub hash: String,
}

/// Draws a key from the system's random numbers.
pub fn make_key() -> Result<MadeKey, getrandom::Error> {
    let id = random_text(ID_CHARS)?;
    let secret = random_text(SECRET_CHARS)?;
    let body = format!("{PREFIX}{id}_{secret}");
    let text = format!("{body}{}", checksum(&body));
    Ok(MadeKey { id, text, hash: hash(&secret) })
}

fn random_text(chars: usize) -> Result<String, getrandom::Error> {
    let mut text = String::new();
    while text.len() < chars {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes)?;
        // 248 is the last multiple of 62 in a byte: beyond it some letters would come more often.
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
    let whole = rest.len() == ID_CHARS + 1 + SECRET_CHARS + CHECKSUM_CHARS;
    if !whole || !rest.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
        return None;
    }
    let (body, sum) = text.split_at(text.len() - CHECKSUM_CHARS);
    let (id, secret) = rest[..rest.len() - CHECKSUM_CHARS].split_once('_')?;
    (id.len() == ID_CHARS && checksum(body) == sum).then_some((id, secret))
}

/// The keys, and those that were looked up a moment ago.
#[derive(Clone)]
pub(super) struct Keys {
    store: Store,
    believed: Cache<String, store::Key>,
}

impl Keys {
    pub(super) fn new(store: Store, time: Duration) -> Self {
        let believed = Cache::builder().max_capacity(BELIEVED_MAX).time_to_live(time).build();
        Self { store, believed }
    }

    /// Whose key it is and what it may do.
    async fn check(&self, text: &str) -> Result<store::Key, Problem> {
        let (id, secret) = parse(text).ok_or_else(unauthorized)?;
        let key = if let Some(key) = self.believed.get(id) {
            key
        } else {
            let key = self.store.find_key(id).await?.filter(|key| key.live).ok_or_else(unauthorized)?;
            self.believed.insert(id.to_owned(), key.clone());
            key
        };
        let right = bool::from(hash(secret).as_bytes().ct_eq(key.hash.as_bytes()));
        match key.tenant_state {
            _ if !right => Err(unauthorized()),
            TenantState::Active => Ok(key),
            TenantState::Disabled | TenantState::Deleting => Err(Problem::tenant_disabled()),
        }
    }
}

fn unauthorized() -> Problem {
    Problem::new(Kind::Unauthorized, "send a valid API key as `Authorization: Bearer hyp_...`")
}

/// Whoever may look: the tenant whose key came.
#[derive(Clone, Debug)]
pub(super) struct Reader {
    pub(super) tenant: TenantId,
    key: Option<String>,
}

/// Whoever may change things.
#[derive(Clone, Debug)]
pub(super) struct Writer {
    pub(super) tenant: TenantId,
}

impl Reader {
    /// Whether the key that opened a long answer is still good.
    pub(super) async fn still(&self, front: &Front) -> bool {
        match &self.key {
            Some(key) => !front
                .keys
                .check(key)
                .await
                .is_err_and(|problem| matches!(problem.kind(), Kind::Unauthorized | Kind::TenantDisabled)),
            None => true,
        }
    }
}

impl FromRequestParts<Front> for Reader {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, front: &Front) -> Result<Self, Problem> {
        identify(parts, front, Scope::Read).await
    }
}

impl FromRequestParts<Front> for Writer {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, front: &Front) -> Result<Self, Problem> {
        let reader = identify(parts, front, Scope::Write).await?;
        Ok(Self { tenant: reader.tenant })
    }
}

async fn identify(parts: &Parts, front: &Front, wanted: Scope) -> Result<Reader, Problem> {
    if parts.uri.query().is_some_and(|query| query.contains(PREFIX)) {
        return Err(Problem::new(
            Kind::KeyInQuery,
            "a key was sent in the URL; it belongs in the Authorization header",
        ));
    }
    if front.settings.auth == Auth::None {
        return Ok(Reader { tenant: TenantId::LOCAL, key: None });
    }
    let text = bearer(&parts.headers).ok_or_else(unauthorized)?;
    let key = front.keys.check(text).await?;
    if wanted == Scope::Write && key.scope != Scope::Write {
        return Err(Problem::new(Kind::Scope, "this key may read only"));
    }
    Ok(Reader { tenant: key.tenant, key: Some(text.to_owned()) })
}

/// The token of the one Authorization header.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let mut all = headers.get_all(header::AUTHORIZATION).iter();
    let (first, None) = (all.next()?, all.next()) else { return None };
    let (scheme, token) = first.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// A server without keys has no other wall against a page in its user's browser than these two questions: was it asked
/// for by its own name (DNS rebinding), and did a page of another site ask?
pub(super) fn guard_local(front: &Front, request: &Request) -> Result<(), Problem> {
    if front.settings.auth == Auth::None {
        if !is_own_host(host(request.uri(), request.headers()), &front.settings.public_url) {
            return Err(Problem::new(Kind::Host, "wanted a loopback name or the public URL's"));
        }
        if is_cross_site(request.uri(), request.headers(), &front.settings.public_url) {
            return Err(Problem::new(Kind::CrossSite, "the request comes from a page of another site"));
        }
    }
    Ok(())
}

/// The host and port that the client asked for.
fn host<'a>(uri: &'a Uri, headers: &'a HeaderMap) -> Option<&'a str> {
    let authority = uri.authority().map(Authority::as_str);
    authority.or_else(|| headers.get(header::HOST)?.to_str().ok())
}

fn is_own_host(host: Option<&str>, public_url: &str) -> bool {
    let Some(host) = host else { return false };
    let name = without_port(host).to_ascii_lowercase();
    let address: Option<IpAddr> = name.trim_matches(['[', ']']).parse().ok();
    let loopback = name == "localhost" || address.is_some_and(|address| address.is_loopback());
    let public = public_url.parse::<Uri>().ok();
    loopback || public.as_ref().and_then(Uri::host).is_some_and(|own| own.eq_ignore_ascii_case(&name))
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    }
}

fn is_cross_site(uri: &Uri, headers: &HeaderMap, public_url: &str) -> bool {
    if let Some(site) = headers.get("sec-fetch-site") {
        return site != "same-origin" && site != "none"; // "same-site" is any other port of this machine
    }
    let Some(origin) = headers.get(header::ORIGIN) else { return false };
    let own = host(uri, headers).map(|host| format!("http://{host}"));
    let public = public_url
        .parse::<Uri>()
        .ok()
        .and_then(|url| Some(format!("{}://{}", url.scheme_str()?, url.authority()?)));
    !origin.to_str().is_ok_and(|origin| [own, public].into_iter().flatten().any(|own| own == origin))
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
    fn a_host_is_ours_by_its_name_only() {
        let public = "https://hypnos.example:8443";
        for own in ["localhost", "localhost:80", "127.0.0.1:8080", "[::1]:80", "127.9.9.9", "Hypnos.Example"]
        {
            assert!(is_own_host(Some(own), public), "{own}");
        }
        for other in ["evil.example", "localhost.evil.example", "10.0.0.1", "", "127.0.0.1.evil.example:80"] {
            assert!(!is_own_host(Some(other), public), "{other}");
        }
        assert!(!is_own_host(None, public));
    }
}
