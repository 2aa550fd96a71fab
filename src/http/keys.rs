//! Who asks: API keys, and what stands in for them on a server without.
//!
//! A key is `hyp_<id>_<secret><checksum>`. The checksum refuses typing errors without a query, the id finds the row,
//! and the row holds a SHA-256 of the secret only: it has 131 random bits, so nothing slower is needed.

use std::net::IpAddr;
use std::ops::{Deref, DerefMut};
use std::time::Duration;

use axum::extract::{FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderName, Uri, Version, header};
use moka::sync::Cache;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::problem::{Kind, Problem};
use super::shares::Place;
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
const KEY_CHARS: usize = PREFIX.len() + ID_CHARS + 1 + SECRET_CHARS + CHECKSUM_CHARS;

const BELIEVED_MAX: u64 = 10_000;
const LOOKUPS_MAX: usize = 8;

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
    if text.len() != KEY_CHARS || !rest.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
        return None;
    }
    let (body, sum) = text.split_at(text.len() - CHECKSUM_CHARS);
    let (id, secret) = rest[..rest.len() - CHECKSUM_CHARS].split_once('_')?;
    (id.len() == ID_CHARS && checksum(body) == sum).then_some((id, secret))
}

/// The keys, and those that were looked up a moment ago.
pub(super) struct Keys {
    store: Store,
    believed: Cache<String, Believed>,
    /// Whoever knows no key asks the database all the same; so few at a time, and those with a known key pass by.
    lookups: Semaphore,
}

/// A key that was looked up.
#[derive(Clone)]
struct Believed {
    key: store::Key,
    /// When it ends, if it does.
    ends: Option<Instant>,
}

impl Keys {
    pub(super) fn new(store: Store, time: Duration) -> Self {
        let believed = Cache::builder().max_capacity(BELIEVED_MAX).time_to_live(time).build();
        Self { store, believed, lookups: Semaphore::new(LOOKUPS_MAX) }
    }

    /// Whose key it is and what it may do.
    async fn check(&self, text: &str) -> Result<Believed, Problem> {
        let (id, secret) = parse(text).ok_or_else(unauthorized)?;
        let found = if let Some(found) = self.believed.get(id) {
            found
        } else {
            let _lookup = self.lookups.acquire().await.map_err(|error| Problem::internal(&error))?;
            let asked = Instant::now();
            let key = self.store.find_key(id).await?.filter(|key| key.live).ok_or_else(unauthorized)?;
            // The database counted what is left, by its own clock, after it was asked.
            let left = key.left_ms.map(|ms| Duration::from_millis(ms.max(0) as u64));
            let found = Believed { key, ends: left.and_then(|left| asked.checked_add(left)) };
            self.believed.insert(id.to_owned(), found.clone());
            found
        };
        let right = bool::from(hash(secret).as_bytes().ct_eq(found.key.hash.as_bytes()));
        let over = found.ends.is_some_and(|ends| ends <= Instant::now());
        match found.key.tenant_state {
            _ if !right || over => Err(unauthorized()),
            TenantState::Active => Ok(found),
            TenantState::Disabled | TenantState::Deleting => Err(Problem::tenant_disabled()),
        }
    }
}

fn unauthorized() -> Problem {
    Problem::new(Kind::Unauthorized, "send a valid API key as `Authorization: Bearer hyp_...`")
}

/// Whoever asks: the tenant whose key came, with a place among the requests that are answered at once.
pub(super) struct Caller {
    pub(super) tenant: TenantId,
    key: Option<String>,
    ends: Option<Instant>,
    place: Option<Place>,
}

/// A caller who may look.
pub(super) struct Reader(pub(super) Caller);

/// A caller who may change things.
pub(super) struct Writer(pub(super) Caller);

/// A caller who may see what concerns all tenants. Without keys, that is whoever is on this machine.
pub(super) struct Operator(pub(super) Caller);

impl Caller {
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

    /// When the key ends, if it does.
    pub(super) fn ends(&self) -> Option<Instant> {
        self.ends
    }

    /// Gives its place back: what follows takes long, and a place of another kind.
    pub(super) fn step_aside(&mut self) {
        self.place = None;
    }

    /// Takes its place again.
    pub(super) async fn step_in(&mut self, front: &Front) -> Result<(), Problem> {
        self.place = Some(front.shares.requests.take(self.tenant).await?);
        Ok(())
    }
}

macro_rules! callers {
    ($($caller:ident: $scope:ident),+) => {$(
        impl Deref for $caller {
            type Target = Caller;

            fn deref(&self) -> &Caller {
                &self.0
            }
        }

        impl DerefMut for $caller {
            fn deref_mut(&mut self) -> &mut Caller {
                &mut self.0
            }
        }

        impl FromRequestParts<Front> for $caller {
            type Rejection = Problem;

            async fn from_request_parts(parts: &mut Parts, front: &Front) -> Result<Self, Problem> {
                identify(parts, front, Scope::$scope).await.map(Self)
            }
        }
    )+};
}
callers!(Reader: Read, Writer: Write, Operator: Admin);

async fn identify(parts: &Parts, front: &Front, wanted: Scope) -> Result<Caller, Problem> {
    if parts.uri.query().is_some_and(holds_key) {
        return Err(Problem::new(
            Kind::KeyInQuery,
            "a key was sent in the URL; it belongs in the Authorization header",
        ));
    }
    let mut caller = Caller { tenant: TenantId::LOCAL, key: None, ends: None, place: None };
    if front.settings.auth == Auth::Keys {
        let text = bearer(&parts.headers).ok_or_else(unauthorized)?;
        let Believed { key, ends } = front.keys.check(text).await?;
        if !key.scope.covers(wanted) {
            let detail = format!("the key's scope is {}; wanted {wanted}", key.scope);
            return Err(Problem::new(Kind::Scope, detail));
        }
        caller = Caller { tenant: key.tenant, key: Some(text.to_owned()), ends, place: None };
    }
    caller.step_in(front).await?;
    Ok(caller)
}

/// Whether a whole key stands in a query, escaped or not. What only looks like the beginning of one may be a name.
fn holds_key(query: &str) -> bool {
    let plain = unescaped(query);
    let mut places = plain.match_indices(PREFIX);
    places.any(|(at, _)| plain.get(at..at + KEY_CHARS).is_some_and(|text| parse(text).is_some()))
}

/// The text that a query's escapes stand for.
fn unescaped(query: &str) -> String {
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

/// The token of the one Authorization header.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let mut all = headers.get_all(header::AUTHORIZATION).iter();
    let (first, None) = (all.next()?, all.next()) else { return None };
    let (scheme, token) = first.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// What a proxy adds to a request, beside all that begins with `x-forwarded`.
const PROXY_HEADERS: [&str; 16] = [
    "forwarded",
    "via",
    "x-real-ip",
    "x-client-ip",
    "x-cluster-client-ip",
    "x-original-forwarded-for",
    "x-original-host",
    "x-original-uri",
    "x-envoy-external-address",
    "true-client-ip",
    "cdn-loop",
    "cf-connecting-ip",
    "cf-ray",
    "fastly-client-ip",
    "fly-client-ip",
    "x-amzn-trace-id",
];

/// A server without keys answers its own machine only, and has no other wall against the rest of the world than these
/// questions: did a proxy pass the request on, was the server asked for by a name of this machine (DNS rebinding), and did
/// a page of another site ask?
pub(super) fn guard_local(front: &Front, request: &Request) -> Result<(), Problem> {
    if front.settings.auth == Auth::None {
        if let Some(sign) = sign_of_proxy(request.version(), request.headers()) {
            let detail = format!(
                "{sign} says that a proxy passed this on, and without keys the server answers its own machine only; \
                 start it with `--auth keys`, or with the `--public-url` that clients use, and make a key with \
                 `hypnos keys create`"
            );
            return Err(Problem::new(Kind::Proxied, detail));
        }
        if !host(request.uri(), request.headers()).is_some_and(|host| is_loopback(without_port(host))) {
            return Err(Problem::new(
                Kind::Host,
                "wanted a name of this machine: localhost or a loopback address",
            ));
        }
        if is_cross_site(request.uri(), request.headers(), &front.settings.public_url) {
            return Err(Problem::new(Kind::CrossSite, "the request comes from a page of another site"));
        }
    }
    Ok(())
}

/// How a request shows that it came through a proxy, if it does. One that adds nothing and names a loopback host cannot be
/// told from a client; but nginx, as it comes, asks in HTTP/1.0, which clients do not any more.
fn sign_of_proxy(version: Version, headers: &HeaderMap) -> Option<String> {
    let is_sign = |name: &&str| name.starts_with("x-forwarded") || PROXY_HEADERS.contains(name);
    let header = headers.keys().map(HeaderName::as_str).find(is_sign);
    let old = version < Version::HTTP_11;
    header.map(|name| format!("the header {name}")).or_else(|| old.then(|| "HTTP/1.0".to_owned()))
}

/// The host and port that the client asked for.
fn host<'a>(uri: &'a Uri, headers: &'a HeaderMap) -> Option<&'a str> {
    let authority = uri.authority().map(Authority::as_str);
    authority.or_else(|| headers.get(header::HOST)?.to_str().ok())
}

/// Whether a host, as it stands in a URL without its port, is this machine whoever asks.
pub(crate) fn is_loopback(host: &str) -> bool {
    let name = host.trim_end_matches('.').to_ascii_lowercase();
    let address: Option<IpAddr> = name.trim_matches(['[', ']']).parse().ok();
    let loopback = address.is_some_and(|address| address.to_canonical().is_loopback());
    loopback || name == "localhost" || name.ends_with(".localhost") // RFC 6761
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
    fn a_host_is_this_machine_by_its_name_only() {
        let own = ["localhost", "LocalHost.:80", "a.localhost", "127.0.0.1:8080", "[::1]:80", "127.9.9.9"];
        for own in own.into_iter().chain(["[::ffff:127.0.0.1]"]) {
            assert!(is_loopback(without_port(own)), "{own}");
        }
        for other in
            ["evil.example", "localhost.evil.example", "10.0.0.1", "", "127.0.0.1.evil.example:80", "127.1"]
        {
            assert!(!is_loopback(without_port(other)), "{other}");
        }
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
            assert!(holds_key(&query), "{query}");
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
            assert!(!holds_key(query), "{query}");
        }
    }

    #[test]
    fn a_proxy_is_known_by_what_it_adds() {
        let sign = |name: &'static str| {
            let headers =
                HeaderMap::from_iter([(HeaderName::from_static(name), "x".parse().expect("a value"))]);
            sign_of_proxy(Version::HTTP_11, &headers)
        };
        for name in [
            "forwarded",
            "x-forwarded-for",
            "x-forwarded-host",
            "x-forwarded-proto",
            "x-forwarded-port",
            "via",
            "x-real-ip",
        ] {
            assert_eq!(sign(name), Some(format!("the header {name}")));
        }
        for name in ["accept", "x-request-id", "forwarded-not", "user-agent", "traceparent"] {
            assert_eq!(sign(name), None, "{name}");
        }
        assert_eq!(sign_of_proxy(Version::HTTP_10, &HeaderMap::new()).as_deref(), Some("HTTP/1.0"));
        assert_eq!(sign_of_proxy(Version::HTTP_2, &HeaderMap::new()), None);
    }
}
