//! The header of one safetensors file: what is accepted is what the safetensors crate accepts, said in words.
//!
//! The crate's own check decides. What is computed here beside it only finds words for a header that it refuses, and
//! names files that are something else altogether.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::{Map, Value};

use crate::error::io_words;

/// Longer headers are refused, as the reference does.
const HEADER_BYTES_MAX: u64 = 100_000_000;

/// Bytes that are looked at to see what a file is: as far as a tar archive's magic.
const HEAD_BYTES: usize = 512;

/// Characters quoted of a file that holds text.
const QUOTED: usize = 40;

/// A header that was read and checked.
#[derive(Debug)]
pub(super) struct Header {
    /// Where the tensors' bytes begin in the file.
    pub(super) data_start: u64,
    /// Type, shape and place of each tensor.
    pub(super) infos: BTreeMap<String, TensorInfo>,
    /// The free text pairs.
    pub(super) metadata: BTreeMap<String, String>,
}

impl Header {
    /// The header of `file`, which has `file_len` bytes; if it is refused, why.
    pub(super) fn read(file: &File, file_len: u64) -> Result<Self, String> {
        let unreadable = |e: std::io::Error| format!("cannot be read: {}", io_words(&e));
        let mut head = vec![0; HEAD_BYTES.min(usize::try_from(file_len).unwrap_or(HEAD_BYTES))];
        file.read_exact_at(&mut head, 0).map_err(unreadable)?;
        let length = announced(&head, file_len)?;
        let mut json = vec![0; length as usize];
        file.read_exact_at(&mut json, 8).map_err(unreadable)?;
        let json = String::from_utf8(json).map_err(|_| "has a header that is not UTF-8".to_owned())?;
        let data_start = 8 + length;
        Self::parse(&json, data_start, file_len - data_start)
    }

    /// `data_len` bytes follow the header in the file.
    fn parse(json: &str, data_start: u64, data_len: u64) -> Result<Self, String> {
        let parsed: Metadata = serde_json::from_str(json).map_err(|e| {
            fault(json, data_len).unwrap_or_else(|| format!("has an inconsistent header: {e}"))
        })?;
        let described = parsed.data_len() as u64;
        if described > data_len {
            let what =
                || format!("is truncated: its tensors take {described} bytes, the file holds {data_len}");
            return Err(fault(json, data_len).unwrap_or_else(what));
        }
        if described < data_len {
            let more = data_len - described;
            return Err(format!("has {more} bytes behind its last tensor; a safetensors file ends with it"));
        }
        let infos = parsed.tensors().into_iter().map(|(name, info)| (name, info.clone())).collect();
        let metadata = parsed.metadata().clone().unwrap_or_default().into_iter().collect();
        Ok(Self { data_start, infos, metadata })
    }
}

/// The length of the header's JSON, which begins after it; if it cannot be one, what the file is instead.
fn announced(head: &[u8], file_len: u64) -> Result<u64, String> {
    let length = head.first_chunk().map(|bytes| u64::from_le_bytes(*bytes));
    let begins = head.get(8..).unwrap_or_default().trim_ascii_start().first();
    // The bytes of a length may look like a pickle's first ones.
    let fits = |n: &u64| *n <= HEADER_BYTES_MAX && *n <= file_len - 8;
    if let Some(n) = length.filter(|n| fits(n) && begins.is_none_or(|b| *b == b'{')) {
        return Ok(n);
    }
    let may_be_pickle = !length.is_some_and(|n| fits(&n)) && begins != Some(&b'{');
    if let Some(other) = something_else(head, may_be_pickle) {
        return Err(format!("{other}; a safetensors file is wanted"));
    }
    Err(match length {
        None => format!("has {file_len} bytes; a safetensors file has at least 8"),
        Some(n) if n > HEADER_BYTES_MAX => {
            format!("announces a header of {n} bytes; at most {HEADER_BYTES_MAX} are read")
        }
        Some(n) if n > file_len - 8 => {
            format!("is truncated: the header alone wants {n} bytes, the file has {file_len}")
        }
        Some(_) => "is not a safetensors file: its header does not begin with `{`".into(),
    })
}

/// What people put where weights belong, by its first bytes.
fn something_else(head: &[u8], may_be_pickle: bool) -> Option<String> {
    const MAGIC: [(usize, &[u8], &str); 12] = [
        (
            0,
            b"PK\x03\x04",
            "is a zip archive, most likely a PyTorch pickle (`hypnos models import` converts it)",
        ),
        (0, b"\x80\x02", "is a Python pickle (`hypnos models import` converts it)"),
        (0, b"\x80\x03", "is a Python pickle (convert it to safetensors)"),
        (0, b"\x80\x04", "is a Python pickle (convert it to safetensors)"),
        (0, b"\x80\x05", "is a Python pickle (convert it to safetensors)"),
        (257, b"ustar", "is a tar archive"),
        (0, b"GGUF", "is a GGUF file"),
        (0, b"\x89HDF\r\n", "is an HDF5 file"),
        (0, b"\x93NUMPY", "is a NumPy file"),
        (0, b"\x1f\x8b", "is a gzip archive"),
        (
            0,
            b"version https://git-lfs",
            "is a git-lfs pointer, not the weights it points to (run `git lfs pull`)",
        ),
        (0, &[0; 16], "begins with zeros, as a download does that was broken off"),
    ];
    let at = |(place, magic, _): &&(usize, &[u8], &str)| {
        head.get(*place..).is_some_and(|h| h.starts_with(magic)) && (may_be_pickle || magic[0] != 0x80)
    };
    if let Some((_, _, what)) = MAGIC.iter().find(at) {
        return Some((*what).to_owned());
    }
    let text = head.trim_ascii_start().to_ascii_lowercase();
    if [&b"<!doctype"[..], b"<html", b"<?xml"].iter().any(|tag| text.starts_with(tag)) {
        return Some("is a web page, most likely the answer to a failed download".into());
    }
    let text = match str::from_utf8(head) {
        Err(e) if e.error_len().is_none() => str::from_utf8(&head[..e.valid_up_to()]), // cut within a character
        text => text,
    };
    let text = text.ok().filter(|text| text.len() > 8)?;
    let printable = text.chars().all(|c| !c.is_control() || c.is_ascii_whitespace());
    let begin: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(QUOTED).collect();
    printable.then(|| format!("is text that begins with `{}`", begin.trim()))
}

/// What is wrong with a header that the crate refuses, where it can be said better.
fn fault(json: &str, data_len: u64) -> Option<String> {
    let entries: Map<String, Value> = match serde_json::from_str(json) {
        Ok(entries) => entries,
        Err(e) => return Some(format!("has a header that is not JSON: {e}")),
    };
    if let Some(text) = entries.get("__metadata__")
        && let Err(e) = serde_json::from_value::<Option<BTreeMap<String, String>>>(text.clone())
    {
        return Some(format!("has bad `__metadata__` in its header: {e}"));
    }
    let tensors = entries.into_iter().filter(|(name, _)| name != "__metadata__");
    tensors
        .into_iter()
        .find_map(|(name, entry)| entry_fault(entry, data_len).map(|what| format!("tensor `{name}` {what}")))
}

/// What is wrong with one tensor's entry, taken alone.
fn entry_fault(entry: Value, data_len: u64) -> Option<String> {
    let info: TensorInfo = match serde_json::from_value(entry) {
        Ok(info) => info,
        Err(e) => return Some(format!("has a bad header entry: {e}")),
    };
    let (begin, end) = info.data_offsets;
    if end as u64 > data_len {
        return Some(format!(
            "ends at byte {end} of the data, but the file holds {data_len}: it is truncated"
        ));
    }
    let n = info.shape.iter().try_fold(1_usize, |n, d| n.checked_mul(*d));
    let Some(bits) = n.and_then(|n| n.checked_mul(info.dtype.bitsize())) else {
        return Some(format!("has the impossible shape {:?}", info.shape));
    };
    let wanted = bits.div_ceil(8);
    (end.checked_sub(begin) != Some(wanted) || bits % 8 != 0).then(|| {
        format!("lies at {begin}..{end}, but {:?} of {:?} takes {wanted} bytes", info.shape, info.dtype)
    })
}
