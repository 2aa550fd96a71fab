//! Requests to a hub, and to other servers: redirects, the token, and what an answer means.
//!
//! The protocol is that of the Hugging Face hub: `GET ENDPOINT/OWNER/NAME/resolve/REVISION/PATH`, which sends large files
//! on to another host. The first answer says what the file is: `X-Linked-Etag` (the SHA-256 of a large file),
//! `X-Linked-Size` and `X-Repo-Commit`.
//!
//! The crate hf-hub 1.0.0 does not serve: it needs reqwest with its default features, which bring a second provider of
//! cryptography (aws-lc-rs) into every client of this program, and hf-xet with its own HTTP client; it begins a file that
//! was cut off again, and compares no hash. Versions before it need reqwest 0.12, a second HTTP stack.

use std::error::Error as StdError;
use std::time::Duration;

use jiff::Timestamp;
use jiff::fmt::rfc2822;
use reqwest::header::{
    ACCEPT_ENCODING, CONTENT_RANGE, CONTENT_TYPE, ETAG, HeaderMap, HeaderName, IF_RANGE, LOCATION, RANGE,
    RETRY_AFTER,
};
use reqwest::{Client, Response, StatusCode, Url, redirect};
use secrecy::{ExposeSecret, SecretString};

use super::Error;
use super::sources::{File, Place};
use crate::ml::io_words;

/// Redirects that are followed for one request.
const REDIRECTS_MAX: usize = 8;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);

/// Longest wait for the next bytes.
const READ_TIMEOUT: Duration = Duration::from_mins(1);

/// Longest wait that a server may ask for.
const WAIT_MAX: Duration = Duration::from_mins(10);

/// A hub, and the clients for it and for other servers.
pub(crate) struct Hub {
    /// For the hub.
    client: Client,
    /// For other servers.
    others: Client,
    endpoint: Url,
    token: Option<SecretString>,
}

/// Why an attempt failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// Another attempt may succeed, after this time if the server says so.
    Again(String, Option<Duration>),
    /// What is there is no beginning of the file, for this reason: another attempt has to begin with its first byte.
    BeginAgain(&'static str),
    /// None will.
    Final(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

/// From where a file is wanted that is there in part.
#[derive(Clone, Debug, Default)]
pub(super) struct Rest {
    /// Bytes that are there.
    pub(super) from: u64,
    /// The entity tag that they came with, if it was a strong one.
    pub(super) validator: Option<String>,
}

/// A file on its way.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) response: Response,
    /// The first byte that comes.
    pub(super) start: u64,
    /// Size of the whole file.
    pub(super) total: Option<u64>,
    /// What the file is, if the server says so: another tag is another file.
    pub(super) etag: Option<String>,
    /// The strong entity tag of the server that sends it.
    pub(super) validator: Option<String>,
    /// SHA-256 that the hub announces.
    pub(super) sha256: Option<String>,
    /// Commit of the repository.
    pub(super) commit: Option<String>,
}

/// What the first server that knows the file says of it.
#[derive(Default)]
struct Linked {
    etag: Option<String>,
    size: Option<u64>,
    commit: Option<String>,
}

impl Hub {
    /// A client for the hub at this URL. [`Error::Input`] if it is none, or a token would travel unencrypted.
    pub(crate) fn new(endpoint: &str, token: Option<SecretString>) -> Result<Self, Error> {
        let bad = |what: &str| Error::Input(format!("HF_ENDPOINT: `{endpoint}` {what}"));
        let url = Url::parse(endpoint).map_err(|e| bad(&format!("is no URL: {e}")))?;
        if !url.username().is_empty() || url.password().is_some() {
            return Err(Error::Input(
                "HF_ENDPOINT: has a password in it, which the log would show; HF_TOKEN is for that".into(),
            ));
        }
        if !matches!(url.scheme(), "http" | "https") || url.query().is_some() || !url.has_host() {
            return Err(bad("is no http:// or https:// URL of a hub"));
        }
        let is_local = matches!(url.host_str(), Some("localhost" | "127.0.0.1" | "[::1]"));
        let is_plain = url.scheme() == "http";
        if token.is_some() && is_plain && !is_local {
            return Err(bad("would get the token in HF_TOKEN unencrypted; https:// is wanted"));
        }
        if token.as_ref().is_some_and(|token| !token.expose_secret().bytes().all(|b| b.is_ascii_graphic())) {
            return Err(Error::Input(
                "HF_TOKEN: has a space, a line break or another character that no token has".into(),
            ));
        }
        // Fails if the same provider is installed already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let others = client(false)?;
        // What goes to this machine in clear, the token with it, goes through no proxy: that is another machine.
        let client = if is_plain && is_local { client(true)? } else { others.clone() };
        Ok(Self { client, others, endpoint: url, token })
    }

    /// Where a file is fetched.
    pub(crate) fn url(&self, file: &File) -> Result<Url, Error> {
        let bad = |what: &str| Error::Input(format!("{}: {what}", file.place.source()));
        match &file.place {
            Place::Url(url) => Url::parse(url).map_err(|e| bad(&e.to_string())),
            Place::Hub { repository, path } => {
                let mut url = self.endpoint.clone();
                let mut segments = url.path_segments_mut().map_err(|()| bad("HF_ENDPOINT takes no path"))?;
                segments
                    .pop_if_empty()
                    .extend(repository.split('/'))
                    .extend(["resolve", file.revision.as_str()]);
                segments.extend(path.split('/'));
                drop(segments);
                Ok(url)
            }
        }
    }

    /// Asks for a file, or for the rest of one.
    pub(super) async fn get(&self, file: &File, rest: &Rest) -> Result<Answer, Failure> {
        let mut url = self.url(file)?;
        let mut linked = Linked::default();
        for _ in 0..=REDIRECTS_MAX {
            let response = self.request(&url, rest).await?;
            linked.read(response.headers());
            if !response.status().is_redirection() {
                let is_hub = url.origin() == self.endpoint.origin();
                return self.answer(file, response, is_hub, linked, rest.from);
            }
            let next = response.headers().get(LOCATION).and_then(|to| url.join(to.to_str().ok()?).ok());
            let next = next.filter(|next| next.scheme() == "https" || next.scheme() == url.scheme());
            url =
                next.ok_or_else(|| final_failure(file, "is redirected to no URL, or to an unencrypted one"))?;
        }
        Err(final_failure(file, &format!("is redirected more than {REDIRECTS_MAX} times")))
    }

    /// One request. Only the hub gets the token, never the hosts that it sends us to.
    async fn request(&self, url: &Url, rest: &Rest) -> Result<Response, Failure> {
        let is_hub = url.origin() == self.endpoint.origin();
        let client = if is_hub { &self.client } else { &self.others };
        let mut request = client.get(url.clone()).header(ACCEPT_ENCODING, "identity");
        if rest.from > 0 {
            request = request.header(RANGE, format!("bytes={}-", rest.from));
            if let Some(validator) = &rest.validator {
                request = request.header(IF_RANGE, validator);
            }
        }
        if let Some(token) = self.token.as_ref().filter(|_| is_hub) {
            request = request.bearer_auth(token.expose_secret());
        }
        request.send().await.map_err(again)
    }

    /// What an answer means that is no redirect.
    fn answer(
        &self,
        file: &File,
        response: Response,
        is_hub: bool,
        linked: Linked,
        from: u64,
    ) -> Result<Answer, Failure> {
        let headers = response.headers();
        match response.status() {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT => {}
            StatusCode::RANGE_NOT_SATISFIABLE if from > 0 => {
                return Err(Failure::BeginAgain(
                    "the server has nothing after the part that was fetched before",
                ));
            }
            status => return Err(self.refusal(file, is_hub, status, headers)),
        }
        if text(headers, &CONTENT_TYPE).is_some_and(|kind| kind.starts_with("text/html")) {
            return Err(final_failure(file, "is answered with a web page; is there a login on the way?"));
        }
        let (start, total) = match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let range = text(headers, &CONTENT_RANGE).and_then(|range| content_range(&range));
                let (start, total) =
                    range.ok_or_else(|| final_failure(file, "comes in part, but not which"))?;
                (start, Some(total))
            }
            _ => (0, response.content_length()),
        };
        if start != 0 && start != from {
            return Err(final_failure(file, &format!("was wanted from byte {from}, but comes from {start}")));
        }
        let own = text(headers, &ETAG);
        let is_of_a_hub = matches!(file.place, Place::Hub { .. });
        let sha256 = linked.etag.as_deref().filter(|tag| is_of_a_hub && is_sha256(tag)).map(str::to_owned);
        Ok(Answer {
            start,
            total: total.or(linked.size),
            etag: linked.etag.or_else(|| own.clone().map(|tag| bare(&tag))),
            validator: own.filter(|tag| !tag.starts_with("W/")),
            sha256,
            commit: linked.commit,
            response,
        })
    }

    /// Why a server did not send the file. `is_hub`: whether that was the hub, and not a host that it sent us to.
    fn refusal(&self, file: &File, is_hub: bool, status: StatusCode, headers: &HeaderMap) -> Failure {
        let said = text(headers, &HeaderName::from_static("x-error-message"));
        let said =
            said.map_or(String::new(), |said| format!(": {}", said.chars().take(300).collect::<String>()));
        let is_denied = matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN);
        let what = match (&file.place, status) {
            (_, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT) => {
                return wait(file, headers, format!("the server answers {status}{said}"));
            }
            (_, status) if status.is_server_error() => {
                return wait(file, headers, format!("the server answers {status}{said}"));
            }
            (Place::Hub { repository, .. }, _) if is_denied && is_hub => {
                self.denial(repository, status, headers) + &said
            }
            // The URL that the hub signed is no longer valid; the next attempt gets another.
            (Place::Hub { .. }, _) if is_denied => {
                return Failure::Again(format!("the host of its content answers {status}"), None);
            }
            (_, StatusCode::NOT_FOUND | StatusCode::GONE) => {
                format!("is not there at revision {} ({status}){said}", file.revision)
            }
            _ => format!("cannot be fetched: the server answers {status}{said}"),
        };
        Failure::Final(Error::Input(format!("{}: {what}", file.place.source())))
    }

    /// What the user can do about a hub that does not give a repository's files to everyone.
    fn denial(&self, repository: &str, status: StatusCode, headers: &HeaderMap) -> String {
        let is_gated =
            text(headers, &HeaderName::from_static("x-error-code")).is_some_and(|code| code == "GatedRepo");
        let endpoint = self.endpoint.as_str().trim_end_matches('/');
        match (is_gated, self.token.is_some()) {
            (true, has_token) => {
                let token = if has_token {
                    "the token in HF_TOKEN"
                } else {
                    "a token, which HF_TOKEN then has to hold"
                };
                format!(
                    "has terms that have to be accepted first, at {endpoint}/{repository}, by the owner of {token}"
                )
            }
            (false, false) => {
                format!("is not there or not for everyone, and HF_TOKEN is not set ({status})")
            }
            (false, true) => format!("is not for the owner of the token in HF_TOKEN ({status})"),
        }
    }
}

/// A client, with the proxies of the environment or none.
fn client(is_direct: bool) -> Result<Client, Error> {
    let client = Client::builder()
        .redirect(redirect::Policy::none()) // they are followed here, for the headers of each
        .connect_timeout(CONNECT_TIMEOUT)
        .read_timeout(READ_TIMEOUT)
        .user_agent(concat!("hypnos/", env!("CARGO_PKG_VERSION")));
    let client = if is_direct { client.no_proxy() } else { client };
    client.build().map_err(|error| Error::Failed(format!("cannot create an HTTP client: {error}")))
}

impl Linked {
    fn read(&mut self, headers: &HeaderMap) {
        let header = |name: &'static str| text(headers, &HeaderName::from_static(name));
        self.etag = self.etag.take().or_else(|| header("x-linked-etag").map(|tag| bare(&tag)));
        self.size = self.size.or_else(|| header("x-linked-size")?.parse().ok());
        self.commit = self.commit.take().or_else(|| header("x-repo-commit"));
    }
}

fn final_failure(file: &File, what: &str) -> Failure {
    Failure::Final(Error::Failed(format!("{}: {what}", file.place.source())))
}

/// A failure of the network. Its URL is left out: it may be a signed one.
pub(super) fn again(error: reqwest::Error) -> Failure {
    let error = error.without_url();
    let mut deepest: &dyn StdError = &error;
    while let Some(deeper) = deepest.source() {
        deepest = deeper;
    }
    Failure::Again(io_words(deepest), None)
}

/// Another attempt when the server says, unless that is too long a time.
fn wait(file: &File, headers: &HeaderMap, what: String) -> Failure {
    let after = text(headers, &RETRY_AFTER).and_then(|after| retry_after(&after, Timestamp::now()));
    match after {
        Some(after) if after > WAIT_MAX => {
            let minutes = after.as_secs().div_ceil(60);
            final_failure(file, &format!("{what}, and asks to wait for {minutes} minutes"))
        }
        // A server that asks for no wait gets the usual one.
        after => Failure::Again(what, after.filter(|after| !after.is_zero())),
    }
}

/// Seconds, or a date.
fn retry_after(value: &str, now: Timestamp) -> Option<Duration> {
    if let Ok(seconds) = value.trim().parse() {
        return Some(Duration::from_secs(seconds));
    }
    let at = rfc2822::parse(value.trim()).ok()?.timestamp();
    Some(Duration::from_secs(at.duration_since(now).as_secs().try_into().unwrap_or(0)))
}

fn text(headers: &HeaderMap, name: &HeaderName) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

/// An entity tag without its quotes.
fn bare(tag: &str) -> String {
    tag.trim_start_matches("W/").trim_matches('"').to_owned()
}

fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// `bytes START-END/TOTAL`.
fn content_range(value: &str) -> Option<(u64, u64)> {
    let (range, total) = value.strip_prefix("bytes ")?.split_once('/')?;
    Some((range.split_once('-')?.0.parse().ok()?, total.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_s_wait_is_a_number_or_a_date() {
        let now: Timestamp = "2026-01-05T10:00:00Z".parse().unwrap();
        let waits = |value: &str| retry_after(value, now).map(|wait| wait.as_secs());
        assert_eq!(waits("120"), Some(120));
        assert_eq!(waits("Mon, 05 Jan 2026 10:01:30 GMT"), Some(90));
        assert_eq!(waits("Mon, 05 Jan 2026 09:00:00 GMT"), Some(0));
        assert_eq!(waits("soon"), None);
    }

    #[test]
    fn a_token_does_not_travel_unencrypted() {
        let token = || Some(SecretString::from("hf_x"));
        assert!(Hub::new("http://hub.example", token()).is_err());
        assert!(Hub::new("http://hub.example", None).is_ok());
        assert!(Hub::new("https://hub.example", token()).is_ok());
        assert!(Hub::new("http://127.0.0.1:80", token()).is_ok());
        assert!(Hub::new("hub.example", None).is_err());
        let refused = Hub::new("https://me:pass@hub.example", None).err().unwrap().to_string();
        assert!(refused.contains("password") && !refused.contains("me:pass"), "{refused}");
    }

    #[test]
    fn a_malformed_token_is_refused_without_showing_it() {
        for token in ["hf_a\n", "hf a", "hf_\u{e4}"] {
            let refused = Hub::new("https://hub.example", Some(token.into())).err().unwrap();
            assert!(matches!(&refused, Error::Input(line) if line.starts_with("HF_TOKEN: ")), "{refused}");
            assert!(!refused.to_string().contains(token), "{refused}");
        }
    }

    #[test]
    fn a_revision_is_one_segment_of_the_url() {
        let hub = Hub::new("https://hub.example/mirror/", None).unwrap();
        let sources = r#"{"name": "n", "kind": "k", "licences": {"MIT": {"url": "u"}}, "parts": [{"name": "base",
            "about": "a", "licence": "MIT", "files": [{"hub": "o/n", "revision": "refs/pr/15", "path": "a b/c.d"}]}]}"#;
        let sources = super::super::sources::Sources::parse(sources, "t".as_ref()).unwrap();
        let file = &sources.parts[0].files(super::super::sources::WeightType::F32)[0];
        let url = hub.url(file).unwrap();
        assert_eq!(url.as_str(), "https://hub.example/mirror/o/n/resolve/refs%2Fpr%2F15/a%20b/c.d");
    }
}
