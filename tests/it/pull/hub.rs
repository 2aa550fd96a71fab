//! A hub on this machine, in the protocol of Hugging Face's: small files it sends itself, large ones another host (the
//! same server by its other name). It notes every request, and fails where it is told to.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, Response, StatusCode};
use futures_util::{StreamExt, stream};
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;

/// Files from this size on are sent by another host.
const LARGE: usize = 20_000;

/// Bytes sent at a time.
const CHUNK: usize = 16 << 10;

pub(super) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What goes wrong with the next request for a file.
#[derive(Clone, Debug)]
pub(super) enum Fault {
    /// An answer with this status and these headers.
    Status(u16, Vec<(&'static str, &'static str)>),
    /// The connection ends after so many bytes.
    Cut(usize),
    /// After so many bytes nothing comes any more.
    Stall(usize),
    /// A web page, of this type.
    Page(&'static str),
    /// Only so many bytes, announced as all.
    Half(usize),
    /// A redirect to another path of the hub, by that path alone.
    Moved,
    /// A refusal by the other host, as of a signed URL that is no longer valid.
    Expired,
}

/// A request as it came.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub(super) path: String,
    pub(super) query: Option<String>,
    /// The name by which the server was called.
    pub(super) host: String,
    pub(super) range: Option<String>,
    pub(super) if_range: Option<String>,
    pub(super) token: Option<String>,
}

#[derive(Default)]
struct Content {
    /// By the path of the URL.
    files: BTreeMap<String, Bytes>,
    faults: HashMap<String, VecDeque<Fault>>,
    asked: Vec<Asked>,
    /// What is announced of a file instead of its own hash.
    announced: HashMap<String, String>,
    /// Whether ranges are not known, so that every answer is the whole file.
    is_without_ranges: bool,
    /// Whether entity tags are weak, so that no client may ask for the rest of a file by them.
    is_weak: bool,
    /// Whether there are none.
    is_without_tags: bool,
    n_stalled: usize,
}

/// The hub, until this is dropped.
#[derive(Clone)]
pub(super) struct Hub {
    port: u16,
    content: Arc<Mutex<Content>>,
}

impl Hub {
    pub(super) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let hub = Self { port, content: Arc::default() };
        let app = Router::new().fallback(answer).with_state(hub.clone());
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        hub
    }

    pub(super) fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub(super) fn put(&self, path: &str, bytes: Vec<u8>) {
        self.content.lock().unwrap().files.insert(path.to_owned(), bytes.into());
    }

    pub(super) fn file(&self, path: &str) -> Bytes {
        self.content.lock().unwrap().files[path].clone()
    }

    /// The next requests for the file fail so, one after the other.
    pub(super) fn fail(&self, path: &str, faults: impl IntoIterator<Item = Fault>) {
        self.content.lock().unwrap().faults.entry(path.to_owned()).or_default().extend(faults);
    }

    pub(super) fn announce(&self, path: &str, sha256: &str) {
        self.content.lock().unwrap().announced.insert(path.to_owned(), sha256.to_owned());
    }

    pub(super) fn weaken_tags(&self) {
        self.content.lock().unwrap().is_weak = true;
    }

    pub(super) fn forget_tags(&self) {
        self.content.lock().unwrap().is_without_tags = true;
    }

    pub(super) fn forget_ranges(&self) {
        self.content.lock().unwrap().is_without_ranges = true;
    }

    /// All requests since the last call.
    pub(super) fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.content.lock().unwrap().asked)
    }

    /// Waits until a request has stalled.
    pub(super) async fn stalled(&self) {
        while self.content.lock().unwrap().n_stalled == 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.content.lock().unwrap().n_stalled = 0;
    }
}

async fn answer(State(hub): State<Hub>, request: Request) -> Response<Body> {
    let headers = request.headers();
    let header = |name: &str| headers.get(name).map(|value| value.to_str().unwrap().to_owned());
    let path = request.uri().path().to_owned();
    let asked = Asked {
        host: header("host").unwrap_or_default(),
        range: header("range"),
        if_range: header("if-range"),
        token: header("authorization"),
        path: path.clone(),
        query: request.uri().query().map(str::to_owned),
    };
    let is_sent_on = path.starts_with("/stored/");
    let of = path.trim_start_matches("/stored").trim_start_matches("/cache").to_owned();
    let (bytes, announced) = {
        let mut content = hub.content.lock().unwrap();
        content.asked.push(asked.clone());
        let Some(bytes) = content.files.get(&of).cloned() else {
            return plain(StatusCode::NOT_FOUND, &[("x-error-code", "EntryNotFound")]);
        };
        let next = content.faults.get_mut(&of).filter(|faults| matches!(faults.front(), Some(Fault::Moved)));
        if next.and_then(VecDeque::pop_front).is_some() {
            return plain(StatusCode::TEMPORARY_REDIRECT, &[("location", &format!("/cache{of}"))]);
        }
        let announced = content.announced.get(&of).cloned();
        (bytes, announced)
    };
    let is_of_the_hub = of.contains("/resolve/");
    let tag = format!("{:x}", Sha256::digest(&bytes));
    if is_of_the_hub && bytes.len() >= LARGE && !is_sent_on {
        // A refusal comes before the other host is named; what goes wrong with the bytes is the other host's doing.
        if let Some(refusal) = hub.refusal(&of, is_sent_on) {
            return refusal;
        }
        let (size, to) = (bytes.len().to_string(), format!("http://localhost:{}/stored{of}", hub.port));
        let linked = format!("\"{}\"", announced.unwrap_or(tag));
        let headers = [
            ("location", &to),
            ("x-linked-etag", &linked),
            ("x-linked-size", &size),
            ("x-repo-commit", &COMMIT.to_owned()),
        ];
        return plain(StatusCode::FOUND, &headers.map(|(name, value)| (name, value.as_str())));
    }
    if let Some(refusal) = hub.refusal(&of, is_sent_on) {
        return refusal;
    }
    hub.send(&of, &bytes, &tag[..40], &asked)
}

fn plain(status: StatusCode, headers: &[(&str, &str)]) -> Response<Body> {
    let mut response = Response::builder().status(status);
    for (name, value) in headers {
        response = response.header(*name, *value);
    }
    response.body(Body::empty()).unwrap()
}

impl Hub {
    /// The next fault of the file, if that is an answer without the file.
    fn refusal(&self, path: &str, is_sent_on: bool) -> Option<Response<Body>> {
        let mut content = self.content.lock().unwrap();
        let faults = content.faults.get_mut(path)?;
        match faults.front()?.clone() {
            Fault::Status(status, headers) => {
                faults.pop_front();
                Some(plain(StatusCode::from_u16(status).unwrap(), &headers))
            }
            Fault::Expired if is_sent_on => {
                faults.pop_front();
                Some(plain(StatusCode::FORBIDDEN, &[]))
            }
            Fault::Page(kind) => {
                faults.pop_front();
                let page = Response::builder().header("content-type", kind);
                Some(page.body(Body::from("\n<!DOCTYPE html><html>Please log in</html>")).unwrap())
            }
            _ => None,
        }
    }

    /// The file, or the rest of it that is asked for.
    fn send(&self, path: &str, bytes: &Bytes, tag: &str, asked: &Asked) -> Response<Body> {
        let weak = if self.content.lock().unwrap().is_weak { "W/" } else { "" };
        let tag = format!("{weak}\"{tag}\"");
        let from = asked
            .range
            .as_ref()
            .and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
        let is_without_ranges = self.content.lock().unwrap().is_without_ranges;
        let from: Option<usize> = from
            .filter(|_| !is_without_ranges && asked.if_range.as_ref().is_none_or(|wanted| *wanted == tag));
        let mut headers = HeaderMap::new();
        let mut say = |name: &'static str, value: String| {
            headers.insert(HeaderName::from_static(name), value.parse().unwrap());
        };
        if !self.content.lock().unwrap().is_without_tags {
            say("etag", tag);
        }
        if path.contains("/resolve/") {
            say("x-repo-commit", COMMIT.into());
        }
        let total = bytes.len();
        let status = match from {
            Some(from) if from >= total => return plain(StatusCode::RANGE_NOT_SATISFIABLE, &[]),
            Some(from) => {
                say("content-range", format!("bytes {from}-{}/{total}", total - 1));
                StatusCode::PARTIAL_CONTENT
            }
            None => StatusCode::OK,
        };
        let rest = bytes.slice(from.unwrap_or(0)..);
        let fault = self.content.lock().unwrap().faults.get_mut(path).and_then(VecDeque::pop_front);
        let n = if let Some(Fault::Half(n)) = fault { n } else { rest.len() };
        say("content-length", n.to_string());
        let mut response = Response::builder().status(status);
        *response.headers_mut().unwrap() = headers;
        response.body(self.body(rest.slice(..n), fault)).unwrap()
    }

    fn body(&self, bytes: Bytes, fault: Option<Fault>) -> Body {
        let end = match fault {
            Some(Fault::Cut(n) | Fault::Stall(n)) => n.min(bytes.len()),
            _ => bytes.len(),
        };
        let pieces: Vec<Bytes> =
            (0..end).step_by(CHUNK).map(|at| bytes.slice(at..end.min(at + CHUNK))).collect();
        let content = Arc::clone(&self.content);
        let last = stream::once(async move {
            match fault {
                Some(Fault::Cut(_)) => {
                    // The client shall have what was sent before the connection ends.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    Err(std::io::Error::other("cut"))
                }
                Some(Fault::Stall(_)) => {
                    content.lock().unwrap().n_stalled += 1;
                    std::future::pending().await
                }
                _ => Ok(Bytes::new()),
            }
        });
        Body::from_stream(stream::iter(pieces.into_iter().map(Ok)).chain(last))
    }
}
