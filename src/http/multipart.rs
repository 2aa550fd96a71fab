//! Reads multipart/form-data (RFC 7578) part by part, with bounds on everything that a sender chooses.
//!
//! Our own, since the common readers keep a part's headers without bound and search them again from their start with
//! every chunk.

use axum::body::Bytes;
use axum::http::HeaderMap;
use bytes::{Buf, BytesMut};
use memchr::memmem::{self, Finder};

use super::activity::Activity;
use super::body::{LimitedBody, media_type};
use super::problem::{Kind, Problem};
use super::spool::Spool;

const BOUNDARY_CHARS_MAX: usize = 70; // RFC 2046 section 5.1.1
const HEAD_BYTES_MAX: usize = 8 * 1024;

/// A form whose parts are read one after the other.
pub(super) struct FormReader {
    body: LimitedBody,
    buffer: BytesMut,
    /// Ends a part: line break, two dashes, boundary.
    delimiter: Vec<u8>,
    finder: Finder<'static>,
    started: bool,
}

impl FormReader {
    /// A reader of the form in `body`.
    pub(super) fn new(headers: &HeaderMap, body: LimitedBody) -> Result<Self, Problem> {
        let Some((_, whole)) = media_type(headers).filter(|(essence, _)| essence == "multipart/form-data")
        else {
            return Err(Problem::new(Kind::MediaType, "the body must be multipart/form-data"));
        };
        let boundary = parameter(whole.as_bytes(), "boundary")
            .filter(|boundary| is_boundary(boundary))
            .ok_or_else(|| {
                let detail =
                    format!("multipart/form-data needs a boundary of 1 to {BOUNDARY_CHARS_MAX} characters");
                Problem::new(Kind::BadBody, detail)
            })?;
        let delimiter = format!("\r\n--{boundary}").into_bytes();
        // As if the body began with a line break, so that its first delimiter looks like all others.
        let (buffer, finder) = (BytesMut::from(&b"\r\n"[..]), Finder::new(&delimiter).into_owned());
        Ok(Self { body, buffer, delimiter, finder, started: false })
    }

    /// From now on everything received touches `activity`.
    pub(super) fn report_to(&mut self, activity: Activity) {
        self.body.report_to(activity);
    }

    /// The next part's name; none after the last. Its content must have been read before the next is asked for.
    pub(super) async fn next_part(&mut self) -> Result<Option<String>, Problem> {
        if !self.started {
            self.started = true;
            self.until_delimiter(HEAD_BYTES_MAX).await?.ok_or_else(|| malformed("has no boundary"))?;
        }
        self.fill(2).await?;
        if self.buffer.starts_with(b"--") {
            while self.body.next_chunk().await?.is_some() {} // the epilogue is ignored
            return Ok(None);
        }
        let end = self.head_end().await?;
        let head = self.buffer.split_to(end + 4);
        part_name(&head).map(Some)
    }

    /// The part's content; none if it is longer than `bytes_max`.
    pub(super) async fn read_part(&mut self, bytes_max: usize) -> Result<Option<Bytes>, Problem> {
        self.until_delimiter(bytes_max).await
    }

    /// Writes the part's content to `spool`; false if it is longer than `bytes_max`.
    pub(super) async fn spool_part(&mut self, bytes_max: usize, spool: &mut Spool) -> Result<bool, Problem> {
        let mut bytes_left = bytes_max;
        loop {
            let found = self.finder.find(&self.buffer);
            // Keeps what may be the beginning of a delimiter.
            let safe = found.unwrap_or((self.buffer.len() + 1).saturating_sub(self.delimiter.len()));
            let Some(left) = bytes_left.checked_sub(safe) else { return Ok(false) };
            bytes_left = left;
            spool.write(&self.buffer.split_to(safe)).await?;
            if found.is_some() {
                self.buffer.advance(self.delimiter.len());
                return Ok(true);
            }
            self.read_more().await?;
        }
    }

    /// Position of the empty line that ends a part's headers.
    async fn head_end(&mut self) -> Result<usize, Problem> {
        let mut searched = 0;
        loop {
            if let Some(at) = memmem::find(&self.buffer[searched..], b"\r\n\r\n") {
                return Ok(searched + at);
            }
            if self.buffer.len() > HEAD_BYTES_MAX {
                return Err(malformed("has a part whose headers are too long"));
            }
            searched = self.buffer.len().saturating_sub(3);
            self.read_more().await?;
        }
    }

    /// The content before the next delimiter, which is consumed too; none if it is longer than `bytes_max`.
    async fn until_delimiter(&mut self, bytes_max: usize) -> Result<Option<Bytes>, Problem> {
        let mut searched = 0;
        loop {
            if let Some(at) = self.finder.find(&self.buffer[searched..]).map(|at| searched + at) {
                let content = self.buffer.split_to(at).freeze();
                self.buffer.advance(self.delimiter.len());
                return Ok((content.len() <= bytes_max).then_some(content));
            }
            searched = (self.buffer.len() + 1).saturating_sub(self.delimiter.len());
            if searched > bytes_max {
                return Ok(None);
            }
            self.read_more().await?;
        }
    }

    async fn fill(&mut self, bytes: usize) -> Result<(), Problem> {
        while self.buffer.len() < bytes {
            self.read_more().await?;
        }
        Ok(())
    }

    async fn read_more(&mut self) -> Result<(), Problem> {
        let chunk =
            self.body.next_chunk().await?.ok_or_else(|| malformed("ends before its last boundary"))?;
        self.buffer.extend_from_slice(&chunk);
        Ok(())
    }
}

fn malformed(how: &str) -> Problem {
    Problem::new(Kind::BadBody, format!("the form {how}"))
}

fn is_boundary(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "'()+_,-./:=? ".contains(c);
    (1..=BOUNDARY_CHARS_MAX).contains(&text.len()) && text.chars().all(allowed)
}

/// The name in a part's Content-Disposition. A file's name is ignored, in whatever encoding it is.
fn part_name(head: &[u8]) -> Result<String, Problem> {
    let ends =
        memmem::find_iter(head, b"\r\n").scan(0, |from, at| Some((std::mem::replace(from, at + 2), at)));
    let mut lines = ends.map(|(from, at)| &head[from..at]);
    let padding = lines.next().unwrap_or_default();
    if !padding.trim_ascii().is_empty() {
        return Err(malformed("has text after a boundary"));
    }
    let disposition = lines.find_map(|line| {
        let (field, value) = split_once(line, b':')?;
        field.trim_ascii().eq_ignore_ascii_case(b"content-disposition").then_some(value)
    });
    let disposition = disposition.filter(|value| {
        let essence = value.split(|&byte| byte == b';').next().unwrap_or_default();
        essence.trim_ascii().eq_ignore_ascii_case(b"form-data")
    });
    disposition
        .and_then(|value| parameter(value, "name"))
        .ok_or_else(|| malformed("has a part without a name"))
}

/// A parameter of a header such as `form-data; name="images"`.
///
/// In a quoted string a backslash escapes the byte after it; but in some code pages a backslash byte is the second half
/// of a letter, and the quote after it ends the string. Where the first interpretation is malformed the second is used.
fn parameter(header: &[u8], wanted: &str) -> Option<String> {
    let (_, rest) = split_once(header, b';')?;
    let read = |escapes: bool| Parameters { rest, escapes, is_malformed: false };
    let well_formed = |escapes: bool| {
        let mut all = read(escapes);
        all.by_ref().for_each(drop);
        !all.is_malformed && all.rest.trim_ascii().is_empty()
    };
    let mut parameters = read(well_formed(true) || !well_formed(false));
    let (_, value) = parameters.find(|(name, _)| name.eq_ignore_ascii_case(wanted.as_bytes()))?;
    Some(String::from_utf8_lossy(&value).into_owned())
}

/// Iterates over the parameters of a header, as names and values. What cannot be parsed stays in `rest`.
struct Parameters<'a> {
    rest: &'a [u8],
    /// Whether a backslash in a quoted string escapes.
    escapes: bool,
    /// Whether a quoted string was followed by something else than the next parameter.
    is_malformed: bool,
}

impl<'a> Iterator for Parameters<'a> {
    type Item = (&'a [u8], Vec<u8>);

    fn next(&mut self) -> Option<Self::Item> {
        let (name, value) = split_once(self.rest, b'=')?;
        let (value, after) = if let Some(quoted) = value.trim_ascii_start().strip_prefix(b"\"") {
            let (value, after) = self.unquote(quoted)?;
            let after = after.trim_ascii();
            let next = after.strip_prefix(b";");
            self.is_malformed |= next.is_none() && !after.is_empty();
            (value, next.unwrap_or(after))
        } else {
            let (token, after) = split_once(value, b';').unwrap_or((value, b""));
            (token.trim_ascii().to_vec(), after)
        };
        self.rest = after;
        Some((name.trim_ascii(), value))
    }
}

impl<'a> Parameters<'a> {
    /// The text before the closing quote, and what follows it.
    fn unquote(&self, text: &'a [u8]) -> Option<(Vec<u8>, &'a [u8])> {
        let mut value = Vec::new();
        let mut rest = text;
        loop {
            match rest {
                [b'"', after @ ..] => return Some((value, after)),
                [b'\\', escaped, after @ ..] if self.escapes => {
                    value.push(*escaped);
                    rest = after;
                }
                [byte, after @ ..] => {
                    value.push(*byte);
                    rest = after;
                }
                [] => return None,
            }
        }
    }
}

fn split_once(bytes: &[u8], at: u8) -> Option<(&[u8], &[u8])> {
    let found = bytes.iter().position(|&byte| byte == at)?;
    Some((&bytes[..found], &bytes[found + 1..]))
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use axum::body::Body;
    use futures_util::stream;

    use super::*;

    /// Every part of `body`, which arrives in chunks of `step` bytes.
    async fn read(
        body: impl AsRef<[u8]>,
        boundary: &str,
        step: usize,
    ) -> Result<Vec<(String, String)>, Problem> {
        let pieces: Vec<_> =
            body.as_ref().chunks(step).map(|piece| Ok::<_, std::io::Error>(piece.to_vec())).collect();
        let mut headers = HeaderMap::new();
        let content_type = format!("multipart/form-data; charset=utf-8; boundary={boundary}");
        headers.insert("content-type", content_type.parse().expect("a header"));
        let body = Body::from_stream(stream::iter(pieces));
        let body = LimitedBody::new(&headers, body, 1 << 20, Duration::from_secs(5))?;
        let mut form = FormReader::new(&headers, body)?;
        let mut parts = Vec::new();
        while let Some(name) = form.next_part().await? {
            // Alternately in memory and spooled: the result is the same.
            let content = if parts.len() % 2 == 0 {
                form.read_part(1000).await?.ok_or_else(|| malformed("is too long"))?
            } else {
                let mut spool = Spool::new(Path::new("nowhere"));
                if !form.spool_part(1000, &mut spool).await? {
                    return Err(malformed("is too long"));
                }
                spool.finish().await?.read().await?
            };
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

    /// A file's name may be in any encoding: Latin-1, Shift-JIS whose last byte is a backslash, GB18030, no text at
    /// all.
    #[tokio::test]
    async fn a_file_s_name_may_be_any_bytes_and_the_part_s_name_is_found_all_the_same() {
        let names: [&[u8]; 7] = [
            b"Gr\xf6\xdfe.jpg",
            b"\x95\x5c",
            b"\x83\x5c.jpg",
            b"C:\\photos\\",
            b"\x816\x8430",
            b"\xff\xfe\x00;\n",
            b"a\\\"b",
        ];
        for file in names {
            for head in [
                [b"form-data; name=\"images\"; filename=\"", file, b"\""].concat(),
                [b"form-data; filename=\"", file, b"\"; name=\"images\""].concat(),
                [b"form-data; filename=\"", file, b"\"; name=images; size=3"].concat(),
            ] {
                let whole = [
                    b"--b\r\nContent-Type: image/png\r\nContent-Disposition: ",
                    &head[..],
                    b"\r\n\r\n1\r\n--b--",
                ]
                .concat();
                let parts = read(&whole, "b", 9).await.expect("a form");
                assert_eq!(parts, [("images".into(), "1".into())], "{}", head.escape_ascii());
            }
        }
    }

    #[tokio::test]
    async fn what_a_sender_chooses_is_bounded() {
        let long_head = part(&format!("name=a; filename=\"{}\"", "x".repeat(9000)), "1");
        let long_part = part("name=a", &"x".repeat(1001));
        let long_second = part("name=a", "1") + &part("name=b", &"x".repeat(1001));
        for body in [
            long_head,
            long_part,
            long_second,
            "x".repeat(9000),
            String::new(),
            "--b".into(),
            "--b\r\n\r\n".into(),
        ] {
            assert!(read(&body, "b", 100).await.is_err(), "{body}");
        }
        for boundary in ["", "\"\"", &"b".repeat(71), "\"a\u{e9}\"", "a;b=\""] {
            let body = part("name=a", "1") + "--b--";
            assert!(read(&body, boundary, 100).await.is_err(), "{boundary}");
        }
    }
}
