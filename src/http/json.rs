//! JSON bodies and documents; an error names the JSON pointer of what is wrong.

use std::time::Duration;

use axum::body::Bytes;
use axum::extract::Request;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::body::{LimitedBody, media_type};
use super::problem::{Kind, Problem, excerpt};
use super::state::AppState;
use crate::job::{self, TenantId};

/// Largest JSON body.
const JSON_BYTES_MAX: usize = 64 * 1024;
const JSON_DEADLINE: Duration = Duration::from_secs(10);

/// Reads a JSON body. Invalid JSON is a `bad-body` problem, valid JSON of another shape a `field` problem.
pub(super) async fn json_body<T: DeserializeOwned + Serialize>(
    app: &AppState,
    tenant: TenantId,
    request: Request,
) -> Result<(T, Bytes), Problem> {
    let (parts, body) = request.into_parts();
    if media_type(&parts.headers).is_none_or(|(essence, _)| essence != "application/json") {
        return Err(Problem::new(Kind::MediaType, "the body must be application/json"));
    }
    let mut body = LimitedBody::new(&parts.headers, body, JSON_BYTES_MAX, JSON_DEADLINE)?;
    let permit = app.pools.bodies.acquire(tenant).await?;
    body.report_to(permit.activity());
    let read = async {
        let mut bytes = Vec::new();
        while let Some(chunk) = body.next_chunk().await? {
            bytes.extend_from_slice(&chunk);
        }
        Ok::<_, Problem>(bytes)
    };
    let bytes = tokio::select! {
        bytes = read => bytes?,
        () = permit.revoked() => {
            return Err(Problem::new(Kind::TooMany, "the body stalled while others waited to send theirs"));
        }
    };
    Ok((from_json(&bytes, "")?, bytes.into()))
}

/// Parses the JSON document at `pointer` of the body.
pub(super) fn from_json<T: DeserializeOwned + Serialize>(bytes: &[u8], pointer: &str) -> Result<T, Problem> {
    let bytes = &whole_numbers(bytes)[..];
    let mut source = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut source)
        .map_err(|error| invalid_json(error.inner(), &format!("{pointer}{}", job::pointer(error.path()))))?;
    source.end().map_err(|error| invalid_json(&error, pointer))?;
    // serde accepts an array of the fields' values for an object.
    let (given, parsed) = (serde_json::from_slice(bytes), serde_json::to_value(&value));
    if let (Ok(given), Ok(parsed)) = (given, parsed)
        && let Some(at) = array_for_object(&given, &parsed)
    {
        let pointer = format!("{pointer}{at}");
        return Err(
            Problem::new(Kind::Field, format!("{pointer}: wanted an object, got an array")).at(pointer)
        );
    }
    Ok(value)
}

/// The same text with `8.0` written `8`: both are integers in JSON Schema, but not for serde.
pub(super) fn whole_numbers(text: &[u8]) -> Vec<u8> {
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

/// JSON pointer to an array where an object is expected.
fn array_for_object(given: &Value, parsed: &Value) -> Option<String> {
    match (given, parsed) {
        (Value::Array(_), Value::Object(_)) => Some(String::new()),
        (Value::Object(given), Value::Object(parsed)) => given.iter().find_map(|(name, given)| {
            array_for_object(given, parsed.get(name)?).map(|rest| format!("/{name}{rest}"))
        }),
        _ => None,
    }
}

pub(super) fn invalid_json(error: &serde_json::Error, pointer: &str) -> Problem {
    let message = excerpt(&error.to_string());
    // serde_json counts a number out of range as a syntax error and a duplicate field as a data error; here it is the
    // reverse.
    let out_of_range = message.starts_with("number out of range");
    let twice = message.starts_with("duplicate field");
    if (error.is_data() && !twice) || out_of_range {
        Problem::new(Kind::Field, format!("{pointer}: {message}")).at(pointer)
    } else {
        Problem::new(Kind::BadBody, format!("invalid JSON: {message}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_numbers_are_written_as_such_and_nothing_else_is_touched() {
        for (given, kept) in [
            (r#"{"a": 8.0, "b": [-1.00, 1.5, 0.10, 1.0e3]}"#, r#"{"a": 8, "b": [-1, 1.5, 0.10, 1.0e3]}"#),
            (r#""8.0 \\" 8.0"#, r#""8.0 \\" 8"#),
            (r#""8.0 \" 8.0"#, r#""8.0 \" 8.0"#),
            ("1.0.0", "1.0"),
            (".0", ".0"),
            ("8.", "8."),
            ("8.0", "8"),
        ] {
            assert_eq!(String::from_utf8_lossy(&whole_numbers(given.as_bytes())), kept, "{given}");
        }
    }
}
