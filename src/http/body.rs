//! Reading a request's body within bounds of size and time, and leaving it politely.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, BodyDataStream, Bytes, HttpBody};
use axum::extract::Request;
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::Response;
use futures_util::StreamExt;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::time::Instant;

use super::Front;
use super::problem::{Kind, Problem};
use super::shares::Life;
use crate::job::{TenantId, TrainOptions};

/// Largest JSON body.
pub(super) const JSON_BYTES_MAX: usize = 64 * 1024;
const JSON_DEADLINE: Duration = Duration::from_secs(10);

const LINGER: Duration = Duration::from_secs(10);
const LINGER_BYTES_MAX: usize = 512 << 20; // the largest upload that can be allowed
/// How long a client that asks whether it may send (`Expect: 100-continue`) waits at least for the answer.
const ASKING: Duration = Duration::from_millis(500);

/// A body that ends after so many bytes or so long, whatever its sender does.
pub(super) struct Inflow {
    stream: BodyDataStream,
    bytes_max: usize,
    bytes_left: usize,
    time: Duration,
    deadline: Option<Instant>,
    life: Life,
}

impl Inflow {
    /// Refuses at once what is packed, and what is announced to be larger than `bytes_max`. The time counts from when the
    /// first bytes are asked for.
    pub(super) fn new(
        headers: &HeaderMap,
        body: Body,
        bytes_max: usize,
        time: Duration,
    ) -> Result<Self, Problem> {
        // A small body that unpacks to a large one is not read.
        if headers.get(header::CONTENT_ENCODING).is_some_and(|encoding| encoding != "identity") {
            return Err(Problem::new(Kind::MediaType, "a body must come without Content-Encoding"));
        }
        if announced(headers).is_some_and(|bytes| bytes > bytes_max as u64) {
            return Err(too_large(bytes_max));
        }
        let stream = body.into_data_stream();
        Ok(Self { stream, bytes_max, bytes_left: bytes_max, time, deadline: None, life: Life::begin() })
    }

    /// All that comes is a sign of this life.
    pub(super) fn signs(&mut self, life: Life) {
        self.life = life;
    }

    /// What came next; none at the end.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, Problem> {
        let deadline = *self.deadline.get_or_insert_with(|| Instant::now() + self.time);
        let next = tokio::time::timeout_at(deadline, self.stream.next()).await;
        let Ok(next) = next else {
            return Err(Problem::new(Kind::BodyTimeout, "the body did not come in time"));
        };
        self.life.sign();
        let Some(chunk) = next else { return Ok(None) };
        let Ok(chunk) = chunk else {
            return Err(Problem::new(Kind::BadBody, "the body broke off"));
        };
        let left = self.bytes_left.checked_sub(chunk.len());
        self.bytes_left = left.ok_or_else(|| too_large(self.bytes_max))?;
        Ok(Some(chunk))
    }
}

/// How long the body is said to be.
pub(super) fn announced(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

fn too_large(bytes_max: usize) -> Problem {
    Problem::new(Kind::BodyTooLarge, format!("the body may hold at most {bytes_max} bytes"))
}

/// The media type of a body, in lower case and without parameters, and the whole header.
pub(super) fn media_type(headers: &HeaderMap) -> Option<(String, &str)> {
    let whole = headers.get(header::CONTENT_TYPE)?.to_str().ok()?;
    let essence = whole.split(';').next().unwrap_or_default();
    Some((essence.trim().to_ascii_lowercase(), whole))
}

/// A JSON body. What is no JSON is a bad body; what is JSON of another shape is a bad field.
pub(super) async fn json<T: DeserializeOwned + Serialize>(
    front: &Front,
    tenant: TenantId,
    request: Request,
) -> Result<(T, Bytes), Problem> {
    let (parts, body) = request.into_parts();
    if media_type(&parts.headers).is_none_or(|(essence, _)| essence != "application/json") {
        return Err(Problem::new(Kind::MediaType, "the body must be application/json"));
    }
    let mut inflow = Inflow::new(&parts.headers, body, JSON_BYTES_MAX, JSON_DEADLINE)?;
    let place = front.shares.bodies.take(tenant).await?;
    inflow.signs(place.life());
    let read = async {
        let mut bytes = Vec::new();
        while let Some(chunk) = inflow.next().await? {
            bytes.extend_from_slice(&chunk);
        }
        Ok::<_, Problem>(bytes)
    };
    let bytes = tokio::select! {
        bytes = read => bytes?,
        () = place.asked_back() => {
            return Err(Problem::new(Kind::TooMany, "nothing more came, and others waited to send"));
        }
    };
    Ok((from_json(&bytes, "")?, bytes.into()))
}

/// A JSON document that stands at `pointer` of the body.
pub(super) fn from_json<T: DeserializeOwned + Serialize>(bytes: &[u8], pointer: &str) -> Result<T, Problem> {
    let bytes = &whole_numbers(bytes)[..];
    let mut source = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut source).map_err(|error| {
        let path: String = error.path().iter().map(segment).collect();
        misfit(error.inner(), &format!("{pointer}{path}"))
    })?;
    source.end().map_err(|error| misfit(&error, pointer))?;
    // serde takes an array of its fields' values for an object.
    let (came, meant) = (serde_json::from_slice(bytes), serde_json::to_value(&value));
    if let (Ok(came), Ok(meant)) = (came, meant)
        && let Some(at) = array_for_object(&came, &meant)
    {
        let pointer = format!("{pointer}{at}");
        return Err(
            Problem::new(Kind::Field, format!("{pointer}: wanted an object, got an array")).at(pointer)
        );
    }
    Ok(value)
}

/// A training's options: what the document at `pointer` says, and for the rest the defaults of its method.
pub(super) fn options(bytes: &[u8], pointer: &str) -> Result<TrainOptions, Problem> {
    from_json::<TrainOptions>(bytes, pointer)?; // says where it is wrong
    let some = serde_json::from_slice(&whole_numbers(bytes)).and_then(|some| TrainOptions::given(&some));
    some.map_err(|error| misfit(&error, pointer))
}

/// The same text with `8.0` written `8`: JSON Schema counts both as integers, serde one.
fn whole_numbers(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let (mut rest, mut quoted) = (text, false);
    while let [byte, after @ ..] = rest {
        let zeros = after.iter().take_while(|&&byte| byte == b'0').count();
        let ends = after.get(zeros).is_none_or(|byte| !matches!(byte, b'0'..=b'9' | b'e' | b'E' | b'.'));
        let follows_digit = plain.last().is_some_and(u8::is_ascii_digit);
        if !quoted && *byte == b'.' && follows_digit && zeros > 0 && ends {
            rest = &after[zeros..];
            continue;
        }
        match (byte, after) {
            (b'\\', [escaped, after @ ..]) if quoted => {
                plain.extend([b'\\', *escaped]);
                rest = after;
                continue;
            }
            (b'"', _) => quoted = !quoted,
            _ => {}
        }
        plain.push(*byte);
        rest = after;
    }
    plain
}

/// Where an array came and an object is meant.
fn array_for_object(came: &Value, meant: &Value) -> Option<String> {
    match (came, meant) {
        (Value::Array(_), Value::Object(_)) => Some(String::new()),
        (Value::Object(came), Value::Object(meant)) => came.iter().find_map(|(name, came)| {
            array_for_object(came, meant.get(name)?).map(|rest| format!("/{name}{rest}"))
        }),
        _ => None,
    }
}

fn segment(segment: &serde_path_to_error::Segment) -> String {
    use serde_path_to_error::Segment;
    match segment {
        Segment::Seq { index } => format!("/{index}"),
        Segment::Map { key } => format!("/{}", key.replace('~', "~0").replace('/', "~1")),
        Segment::Enum { .. } | Segment::Unknown => String::new(),
    }
}

fn misfit(error: &serde_json::Error, pointer: &str) -> Problem {
    let said = shorten(&error.to_string());
    // A number beyond every range and a name given twice are our grammar's words for values, and the reverse.
    let out_of_range = said.starts_with("number out of range");
    let twice = said.starts_with("duplicate field");
    if (error.is_data() && !twice) || out_of_range {
        Problem::new(Kind::Field, format!("{pointer}: {said}")).at(pointer)
    } else {
        Problem::new(Kind::BadBody, format!("not acceptable as JSON: {said}"))
    }
}

/// A stranger's text is repeated in part only, and without what cannot be seen.
pub(super) fn shorten(text: &str) -> String {
    const CHARS_MAX: usize = 200;
    let mut short: String = text.chars().take(CHARS_MAX).flat_map(char::escape_debug).collect();
    if text.chars().nth(CHARS_MAX).is_some() {
        short.push_str("...");
    }
    short
}

/// A client that is refused while it still sends would find its connection reset and our answer gone. So what it sends
/// is read on for a while, and thrown away.
pub(super) async fn linger(request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    let (asks_first, began) = (parts.headers.contains_key(header::EXPECT), Instant::now());
    let shared = Shared(Arc::new(Mutex::new(Lent { body, read: false })));
    let response = next.run(Request::from_parts(parts, Body::new(shared.clone()))).await;
    if response.status().is_client_error() || response.status().is_server_error() {
        let Lent { body, read } = std::mem::take(&mut *shared.lock());
        // One that asks whether it may send, and is told no soon enough, has not begun.
        let sends = read || !asks_first || began.elapsed() > ASKING;
        if sends && !body.is_end_stream() {
            tokio::spawn(tokio::time::timeout(LINGER, drain(body)));
        }
    }
    response
}

async fn drain(body: Body) {
    let mut stream = body.into_data_stream();
    let mut bytes_left = LINGER_BYTES_MAX;
    while let Some(Ok(chunk)) = stream.next().await {
        let Some(left) = bytes_left.checked_sub(chunk.len()) else { break };
        bytes_left = left;
    }
}

/// A body that can be taken back from whoever reads it.
#[derive(Clone)]
struct Shared(Arc<Mutex<Lent>>);

/// The body, and whether anybody has begun to read it.
#[derive(Default)]
struct Lent {
    body: Body,
    read: bool,
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Lent> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl HttpBody for Shared {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<hyper::body::Frame<Bytes>, axum::Error>>> {
        let mut lent = self.lock();
        lent.read = true;
        Pin::new(&mut lent.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.lock().body.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.lock().body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_numbers_are_written_as_such_and_nothing_else_is_touched() {
        for (came, kept) in [
            (r#"{"a": 8.0, "b": [-1.00, 1.5, 0.10, 1.0e3]}"#, r#"{"a": 8, "b": [-1, 1.5, 0.10, 1.0e3]}"#),
            (r#""8.0 \\" 8.0"#, r#""8.0 \\" 8"#),
            (r#""8.0 \" 8.0"#, r#""8.0 \" 8.0"#),
            ("1.0.0", "1.0"),
            (".0", ".0"),
            ("8.", "8."),
            ("8.0", "8"),
        ] {
            assert_eq!(String::from_utf8_lossy(&whole_numbers(came.as_bytes())), kept, "{came}");
        }
    }
}
