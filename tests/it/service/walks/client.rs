//! Requests of clients in a walk, and the answers they got.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::Path;
use std::sync::LazyLock;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::Request;
use hypnos::blobs::Blobs;
use hypnos::health::Health;
use hypnos::http::{AppState, Auth, Settings};
use hypnos::photo::{Decoder, Limits};
use hypnos::store::Store;
use image::{ImageFormat, Rgb, RgbImage};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

/// An HTTP server over these, as clients see it.
pub(super) fn server(store: Store, blobs: Blobs, attempts_max: i64, spool: &Path) -> Router {
    static METRICS: LazyLock<PrometheusHandle> =
        LazyLock::new(|| PrometheusBuilder::new().build_recorder().handle());
    let settings = Settings {
        auth: Auth::None,
        photo_bytes_max: 1 << 20,
        attempts_max,
        spool: spool.to_owned(),
        ..Settings::default()
    };
    let limits = Limits { side_min: 32, ..Limits::default() };
    let decoder = Decoder::new(limits, 4, std::time::Duration::from_mins(1));
    let (closing, devices) = (CancellationToken::new(), Health::default());
    AppState::new(store, blobs, decoder, settings, METRICS.clone(), closing, devices, None).router()
}

/// A job that a client wants.
#[derive(Clone, Debug)]
pub(super) struct WantedJob {
    /// Its `Idempotency-Key`.
    pub(super) key: Option<String>,
    /// The training to draw with, for a sample.
    pub(super) parent: Option<String>,
    /// The job that is to be done again.
    pub(super) retry_of: Option<String>,
    /// What is trained: no two trainings of a walk are called alike.
    pub(super) class_name: String,
    pub(super) steps: u64,
    pub(super) seed: u64,
    pub(super) submission: Submission,
}

/// What a client knows of the job that it wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Submission {
    /// Sent; there is no answer yet.
    Pending,
    /// The answer was lost, or says that the outcome is unknown: the job may exist.
    Unknown,
    /// The answer says that the job exists.
    Accepted(String),
    /// The answer says that there will be no such job.
    Refused,
}

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ClientRequest {
    /// This one of the jobs that are wanted.
    Job(usize),
    Cancel(String),
    Delete(String),
    Read {
        id: String,
        /// Whether an answer before this request said that the job is gone.
        was_deleted: bool,
    },
}

/// What came back: status and document.
pub(super) type Answer = (u16, Value);

/// Sends a request and waits for its answer.
pub(super) async fn send(server: Router, request: Request<Body>) -> Answer {
    let response = server.oneshot(request).await.unwrap_or_else(|never| match never {});
    let status = response.status().as_u16();
    let body = to_bytes(response.into_body(), 1 << 20).await.unwrap();
    (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
}

/// As small a photo as may be, that looks like no other of another number.
fn photo(n: u32) -> Vec<u8> {
    let picture =
        RgbImage::from_fn(32, 32, |x, y| Rgb([(x * 7 * n) as u8, (y * 5 * n) as u8, (x * y + n) as u8]));
    let mut png = Cursor::new(Vec::new());
    picture.write_to(&mut png, ImageFormat::Png).unwrap();
    png.into_inner()
}

/// The request for a job.
pub(super) fn job(wanted: &WantedJob) -> Request<Body> {
    const BOUNDARY: &str = "a-boundary";
    static PHOTOS: LazyLock<[Vec<u8>; 3]> = LazyLock::new(|| [1, 2, 3].map(photo));
    let mut request = Request::post(match (&wanted.retry_of, &wanted.parent) {
        (Some(id), parent) => format!("/v1/{}/{id}/retry", place(parent.is_some())),
        (None, Some(parent)) => format!("/v1/jobs/{parent}/sample"),
        (None, None) => "/v1/jobs".into(),
    });
    request = request.header("host", "127.0.0.1:8080");
    if let Some(key) = &wanted.key {
        request = request.header("idempotency-key", key);
    }
    if wanted.retry_of.is_some() {
        return request.body(Body::empty()).unwrap();
    }
    if wanted.parent.is_some() {
        let spec = json!({ "prompts": ["{product} on a table"], "n": 1, "steps": 2, "seed": wanted.seed });
        return request.header("content-type", "application/json").body(spec.to_string().into()).unwrap();
    }
    let options = json!({
        "steps": wanted.steps, "seed": wanted.seed, "class_images": 1, "evaluation": { "images": 1 },
    });
    let mut form = Vec::new();
    let mut part = |head: &str, bytes: &[u8]| {
        form.extend_from_slice(
            format!("--{BOUNDARY}\r\nContent-Disposition: form-data; {head}\r\n\r\n").as_bytes(),
        );
        form.extend_from_slice(bytes);
        form.extend_from_slice(b"\r\n");
    };
    part("name=\"class_name\"", wanted.class_name.as_bytes());
    part("name=\"options\"", options.to_string().as_bytes());
    for photo in &*PHOTOS {
        part("name=\"images\"; filename=\"photo.png\"", photo);
    }
    form.extend_from_slice(format!("--{BOUNDARY}--\r\n").as_bytes());
    let media_type = format!("multipart/form-data; boundary={BOUNDARY}");
    request.header("content-type", media_type).body(form.into()).unwrap()
}

/// A request about an existing job.
pub(super) fn about(request: &ClientRequest, is_sample: bool) -> Request<Body> {
    let (method, id, rest) = match request {
        ClientRequest::Cancel(id) => ("POST", id, "/cancel"),
        ClientRequest::Delete(id) => ("DELETE", id, ""),
        ClientRequest::Read { id, .. } => ("GET", id, ""),
        ClientRequest::Job(_) => unreachable!("that is a request for a job"),
    };
    let request = Request::builder().method(method).uri(format!("/v1/{}/{id}{rest}", place(is_sample)));
    request.header("host", "127.0.0.1:8080").body(Body::empty()).unwrap()
}

/// Where jobs of that kind are found.
fn place(is_sample: bool) -> &'static str {
    if is_sample { "samples" } else { "jobs" }
}

/// What a client knows of a job that was accepted.
#[derive(Clone, Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a separate fact from an answer or a request")]
pub(super) struct KnownJob {
    /// Which of the jobs that are wanted it is.
    pub(super) wanted: usize,
    pub(super) is_sample: bool,
    /// An answer said that it is canceled, or will be.
    pub(super) canceled: bool,
    /// A deletion was sent; from then on it may be gone.
    pub(super) delete_sent: bool,
    /// An answer said that it is gone.
    pub(super) deleted: bool,
}

/// All that clients want and know.
#[derive(Clone, Debug, Default)]
pub(super) struct Clients {
    pub(super) wanted: Vec<WantedJob>,
    pub(super) known: BTreeMap<String, KnownJob>,
}

impl Clients {
    /// Processes an answer; none if there was none.
    pub(super) fn receive(
        &mut self,
        request: &ClientRequest,
        answer: Option<&Answer>,
    ) -> Result<String, String> {
        let Some((status, body)) = answer else {
            if let ClientRequest::Job(n) = request {
                self.forget_answer(*n);
            }
            return Ok("no answer".into());
        };
        let said =
            format!("{status}{}", body["type"].as_str().map(|kind| format!(" {kind}")).unwrap_or_default());
        match (request, status) {
            (_, 500) => return Err(format!("{request:?} was answered {said}: {body}")),
            (ClientRequest::Job(n), 200 | 202) => self.accepted(*n, body)?,
            (ClientRequest::Job(n), 500..) => self.forget_answer(*n),
            (ClientRequest::Job(n), 404 | 409 | 429) => {
                let wanted = &mut self.wanted[*n];
                match &wanted.submission {
                    Submission::Accepted(id) if !self.known[id].delete_sent => {
                        return Err(format!("{id} was accepted, and then its key was refused: {said}"));
                    }
                    Submission::Accepted(_) => {}
                    _ => wanted.submission = Submission::Refused,
                }
            }
            (ClientRequest::Cancel(id), 202) => {
                let state = body["state"].as_str().unwrap_or_default();
                let known = self.known.get_mut(id).expect("only what was accepted is canceled");
                known.canceled |= !matches!(state, "succeeded" | "failed");
            }
            (ClientRequest::Delete(id), 204) => {
                for (other, known) in &mut self.known {
                    let of_it = self.wanted[known.wanted].parent.as_ref() == Some(id);
                    known.deleted |= other == id || of_it;
                }
            }
            (ClientRequest::Read { id, .. } | ClientRequest::Cancel(id) | ClientRequest::Delete(id), 404) => {
                if !self.may_be_gone(id) {
                    return Err(format!("{id} was accepted and not deleted, but is not there: {said}"));
                }
            }
            (ClientRequest::Read { id, was_deleted: true }, 200) => {
                return Err(format!("{id} was deleted, and is seen again"));
            }
            (ClientRequest::Read { .. }, 200) | (_, 500..) => {}
            _ => return Err(format!("{request:?} was answered {said}: {body}")),
        }
        Ok(said)
    }

    fn accepted(&mut self, n: usize, body: &Value) -> Result<(), String> {
        let id = body["id"].as_str().ok_or("accepted without an id")?.to_owned();
        let wanted = &mut self.wanted[n];
        if let Submission::Accepted(before) = &wanted.submission
            && *before != id
            && !self.known[before].delete_sent
        {
            return Err(format!("one key is two jobs: {before} and {id}"));
        }
        wanted.submission = Submission::Accepted(id.clone());
        let parent = wanted.parent.as_ref();
        // Deleted with its training since.
        let delete_sent = parent.is_some_and(|parent| self.known[parent].delete_sent);
        let known = KnownJob { wanted: n, is_sample: parent.is_some(), delete_sent, ..KnownJob::default() };
        self.known.entry(id).or_insert(known);
        Ok(())
    }

    /// Without an answer a client does not know the outcome, unless an earlier answer said it.
    fn forget_answer(&mut self, n: usize) {
        let submission = &mut self.wanted[n].submission;
        if *submission == Submission::Pending {
            *submission = Submission::Unknown;
        }
    }

    /// A deletion is sent.
    pub(super) fn delete_sent(&mut self, id: &str) {
        for (other, known) in &mut self.known {
            let of_it = self.wanted[known.wanted].parent.as_deref() == Some(id);
            known.delete_sent |= other == id || of_it;
        }
    }

    /// Whether it may be gone by a client's own doing.
    pub(super) fn may_be_gone(&self, id: &str) -> bool {
        self.known.get(id).is_none_or(|known| known.delete_sent)
    }
}
