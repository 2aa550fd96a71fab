//! multipart/form-data (RFC 7578), one part after the other, with bounds on everything that a sender chooses.
//!
//! Written here since the common readers keep a part's headers without bound and search them again from their start
//! with every chunk that comes.

use axum::body::{Body, Bytes};
use axum::http::HeaderMap;
use bytes::{Buf, BytesMut};

use super::body::{Inflow, media_type};
use super::problem::{Kind, Problem};

const BOUNDARY_CHARS_MAX: usize = 70; // RFC 2046 section 5.1.1
const HEAD_BYTES_MAX: usize = 8 * 1024;

/// A form that is being read.
pub(super) struct Form {
    inflow: Inflow,
    buffer: BytesMut,
    /// What ends a part: line break, two dashes, boundary.
    delimiter: Vec<u8>,
    begun: bool,
}

impl Form {
    /// A form that must have come whole within `time` and `bytes_max`.
    pub(super) fn new(
        headers: &HeaderMap,
        body: Body,
        bytes_max: usize,
        time: std::time::Duration,
    ) -> Result<Self, Problem> {
        let Some((_, whole)) = media_type(headers).filter(|(essence, _)| essence == "multipart/form-data")
        else {
            return Err(Problem::new(Kind::MediaType, "the body must be multipart/form-data"));
        };
        let boundary =
            parameter(whole, "boundary").filter(|boundary| is_boundary(boundary)).ok_or_else(|| {
                let detail =
                    format!("multipart/form-data needs a boundary of 1 to {BOUNDARY_CHARS_MAX} characters");
                Problem::new(Kind::BadBody, detail)
            })?;
        let inflow = Inflow::new(headers, body, bytes_max, time)?;
        let delimiter = format!("\r\n--{boundary}").into_bytes();
        // As if the body began with a line break, so that its first delimiter looks like all others.
        Ok(Self { inflow, buffer: BytesMut::from(&b"\r\n"[..]), delimiter, begun: false })
    }

    /// The next part's name; none after the last. Its content must have been read before the next is asked for.
    pub(super) async fn next(&mut self) -> Result<Option<String>, Problem> {
        if !self.begun {
            self.begun = true;
            self.until_delimiter(HEAD_BYTES_MAX).await?.ok_or_else(|| broken("holds no boundary"))?;
        }
        self.fill(2).await?;
        if self.buffer.starts_with(b"--") {
            while self.inflow.next().await?.is_some() {} // an epilogue says nothing
            return Ok(None);
        }
        let end = self.head_end().await?;
        let head = self.buffer.split_to(end + 4);
        name(&head).map(Some)
    }

    /// The part's content; none if it is longer than `bytes_max`.
    pub(super) async fn content(&mut self, bytes_max: usize) -> Result<Option<Bytes>, Problem> {
        self.until_delimiter(bytes_max).await
    }

    /// Where the empty line stands that ends a part's headers.
    async fn head_end(&mut self) -> Result<usize, Problem> {
        let mut searched = 0;
        loop {
            if let Some(at) = find(&self.buffer[searched..], b"\r\n\r\n") {
                return Ok(searched + at);
            }
            if self.buffer.len() > HEAD_BYTES_MAX {
                return Err(broken("has a part with too long a head"));
            }
            searched = self.buffer.len().saturating_sub(3);
            self.more().await?;
        }
    }

    /// What stands before the next delimiter, which is taken too; none if it is longer than `bytes_max`.
    async fn until_delimiter(&mut self, bytes_max: usize) -> Result<Option<Bytes>, Problem> {
        let mut searched = 0;
        loop {
            if let Some(at) = find(&self.buffer[searched..], &self.delimiter).map(|at| searched + at) {
                let content = self.buffer.split_to(at).freeze();
                self.buffer.advance(self.delimiter.len());
                return Ok((content.len() <= bytes_max).then_some(content));
            }
            searched = (self.buffer.len() + 1).saturating_sub(self.delimiter.len());
            if searched > bytes_max {
                return Ok(None);
            }
            self.more().await?;
        }
    }

    async fn fill(&mut self, bytes: usize) -> Result<(), Problem> {
        while self.buffer.len() < bytes {
            self.more().await?;
        }
        Ok(())
    }

    async fn more(&mut self) -> Result<(), Problem> {
        let chunk = self.inflow.next().await?.ok_or_else(|| broken("ends before its last boundary"))?;
        self.buffer.extend_from_slice(&chunk);
        Ok(())
    }
}

fn broken(how: &str) -> Problem {
    Problem::new(Kind::BadBody, format!("the form {how}"))
}

fn is_boundary(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "'()+_,-./:=? ".contains(c);
    (1..=BOUNDARY_CHARS_MAX).contains(&text.len()) && text.chars().all(allowed)
}

/// The name in a part's Content-Disposition. What it says of files is not heard.
fn name(head: &[u8]) -> Result<String, Problem> {
    let head = std::str::from_utf8(head).map_err(|_| broken("has a part whose head is not UTF-8"))?;
    let (padding, head) = head.split_once("\r\n").unwrap_or_default();
    if !padding.trim_matches([' ', '\t']).is_empty() {
        return Err(broken("has text after a boundary"));
    }
    let disposition = head.split("\r\n").find_map(|line| {
        let (field, value) = line.split_once(':')?;
        field.trim().eq_ignore_ascii_case("content-disposition").then_some(value)
    });
    let disposition = disposition.filter(|value| {
        let essence = value.split(';').next().unwrap_or_default();
        essence.trim().eq_ignore_ascii_case("form-data")
    });
    disposition.and_then(|value| parameter(value, "name")).ok_or_else(|| broken("has a part without a name"))
}

/// A parameter of a header such as `form-data; name="images"`.
fn parameter(header: &str, wanted: &str) -> Option<String> {
    let (_, mut rest) = header.split_once(';')?;
    loop {
        let (name, value) = rest.split_once('=')?;
        let (value, after) = if let Some(quoted) = value.trim_start().strip_prefix('"') {
            unquote(quoted)?
        } else {
            let (token, after) = value.split_once(';').unwrap_or((value, ""));
            (token.trim().to_owned(), after)
        };
        if name.trim().eq_ignore_ascii_case(wanted) {
            return Some(value);
        }
        rest = after.trim_start().strip_prefix(';').unwrap_or(after);
    }
}

/// What stands before the closing quote, and what after it.
fn unquote(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    loop {
        match chars.next()? {
            (at, '"') => return Some((value, &text[at + 1..])),
            (_, '\\') => value.push(chars.next()?.1),
            (_, c) => value.push(c),
        }
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    let mut from = 0;
    loop {
        let at = from + haystack[from..].iter().position(|&byte| byte == needle[0])?;
        if haystack[at..].starts_with(needle) {
            return Some(at);
        }
        from = at + 1;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures_util::stream;

    use super::*;

    /// Every part of `body`, which comes in pieces of `step` bytes.
    async fn read(body: &str, boundary: &str, step: usize) -> Result<Vec<(String, String)>, Problem> {
        let pieces: Vec<_> =
            body.as_bytes().chunks(step).map(|piece| Ok::<_, std::io::Error>(piece.to_vec())).collect();
        let mut headers = HeaderMap::new();
        let content_type = format!("multipart/form-data; charset=utf-8; boundary={boundary}");
        headers.insert("content-type", content_type.parse().expect("a header"));
        let body = Body::from_stream(stream::iter(pieces));
        let mut form = Form::new(&headers, body, 1 << 20, Duration::from_secs(5))?;
        let mut parts = Vec::new();
        while let Some(name) = form.next().await? {
            let content = form.content(1000).await?.ok_or_else(|| broken("is too long"))?;
            parts.push((name, String::from_utf8_lossy(&content).into_owned()));
        }
        Ok(parts)
    }

    fn part(name: &str, content: &str) -> String {
        format!("--b\r\nContent-Disposition: form-data; {name}\r\n\r\n{content}\r\n")
    }

    #[tokio::test]
    async fn parts_are_the_same_however_the_bytes_come() {
        let tricky = "-b\r\n--\r\n-b";
        let quoted = part(r#"name="a\"b"; filename="x;name=y""#, tricky);
        let body = [part("filename=\"name=z\"; name=one", ""), quoted, "--b--\r\nepilogue".into()].concat();
        for step in [1, 2, 3, 7, 1000] {
            let parts = read(&body, "b", step).await.expect("a form");
            assert_eq!(parts, [("one".into(), String::new()), ("a\"b".into(), tricky.into())]);
        }
    }

    #[tokio::test]
    async fn a_form_with_a_preamble_is_read_and_one_without_an_end_is_not() {
        let body = format!("words\r\n{}--b--", part("name=a", "1"));
        assert_eq!(read(&body, "\"b\"", 5).await.expect("a form").len(), 1);
        for end in 1..body.len() {
            assert!(read(&body[..end], "b", 5).await.is_err(), "{end}");
        }
    }

    #[tokio::test]
    async fn what_a_sender_chooses_is_bounded() {
        let long_head = part(&format!("name=a; filename=\"{}\"", "x".repeat(9000)), "1");
        let long_part = part("name=a", &"x".repeat(1001));
        for body in
            [long_head, long_part, "x".repeat(9000), String::new(), "--b".into(), "--b\r\n\r\n".into()]
        {
            assert!(read(&body, "b", 100).await.is_err(), "{body}");
        }
        for boundary in ["", "\"\"", &"b".repeat(71), "\"a\u{e9}\"", "a;b=\""] {
            let body = part("name=a", "1") + "--b--";
            assert!(read(&body, boundary, 100).await.is_err(), "{boundary}");
        }
    }
}
