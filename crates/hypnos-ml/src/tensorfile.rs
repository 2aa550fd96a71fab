//! Reads and writes safetensors files: checked with suspicion when read, whole or not at all when written.
//!
//! A file from elsewhere may be cut off, claim a header of terabytes, or be something else altogether, so every number
//! in the header is checked here before anything is allocated from it; the safetensors crate then checks it again.
//! Format: <https://github.com/huggingface/safetensors#format>. Pickles (`.bin`, `.ckpt`) are recognised and refused,
//! never opened. Names and shapes mean nothing here; [`super::weights`] gives them their meaning.
//!
//! Departure: tensors are read by position instead of through a memory map. Everything becomes f32 in memory, so a
//! copy is made in either case; this way the file's pages do not count as the process's memory, and another program
//! that cuts the file short causes an error instead of a SIGBUS.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::error::io_words;
use super::{Error, Result};

/// Headers above this are refused: the real SD 1.5 UNet needs 0.1 MiB.
const HEADER_BYTES_MAX: u64 = 16 << 20;

/// Elements converted at a time, by one thread.
const CHUNK: usize = 1 << 18;

/// An open safetensors file: its header checked, its tensors still on disk.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    file: File,
    data_start: u64,
    infos: BTreeMap<String, TensorInfo>,
    metadata: BTreeMap<String, String>,
}

impl TensorFile {
    /// Opens the file and checks its header: length, JSON, and that each tensor's bytes fit its shape and lie within
    /// the file. [`Error::File`] names the file, and the tensor where there is one.
    pub fn open(path: &Path) -> Result<TensorFile> {
        let bad = |what: String| Error::file(path, what);
        let mut file = File::open(path).map_err(|e| Error::io(path, "cannot be opened", e))?;
        let about = file.metadata().map_err(|e| Error::io(path, "cannot be read", e))?;
        if !about.is_file() {
            return Err(bad("is not a file; a safetensors file was wanted".into()));
        }
        let header = read_header(&mut file, about.len()).map_err(&bad)?;
        let data_start = 8 + header.len() as u64;
        let (infos, metadata) = parse_header(&header, about.len() - data_start).map_err(&bad)?;
        Ok(TensorFile { path: path.to_owned(), file, data_start, infos, metadata })
    }

    /// Where the file lies.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The free text pairs of the header.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.infos.keys().map(String::as_str)
    }

    /// The shape of a tensor, if there is one of that name.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.infos.get(name).map(|i| i.shape.as_slice())
    }

    /// The type of a tensor, if there is one of that name.
    pub fn dtype(&self, name: &str) -> Option<Dtype> {
        self.infos.get(name).map(|i| i.dtype)
    }

    /// One tensor in f32, row-major, from f64, f32, f16 or bf16. [`Error::File`] for other types, a missing tensor,
    /// or a file that has become unreadable.
    pub fn read(&self, name: &str) -> Result<Vec<f32>> {
        let bad = |what: String| Error::file(&self.path, format!("tensor `{name}` {what}"));
        let info = self.infos.get(name).ok_or_else(|| bad("is missing".into()))?;
        let (width, widen) = widening(info.dtype)
            .ok_or_else(|| bad(format!("has type {:?}; F32, F16, BF16 or F64 is wanted", info.dtype)))?;
        let start = self.data_start + info.data_offsets.0 as u64;
        let mut values = vec![0f32; info.shape.iter().product()];
        values
            .par_chunks_mut(CHUNK)
            .enumerate()
            .try_for_each(|(i, out)| {
                let mut bytes = vec![0u8; out.len() * width];
                self.file.read_exact_at(&mut bytes, start + (i * CHUNK * width) as u64)?;
                widen(&bytes, out);
                Ok(())
            })
            .map_err(|e: std::io::Error| {
                Error::io(&self.path, &format!("tensor `{name}` cannot be read"), e)
            })?;
        Ok(values)
    }
}

/// The header's JSON, or what the file is instead.
fn read_header(file: &mut File, file_len: u64) -> Result<Vec<u8>, String> {
    let mut head = Vec::with_capacity(64);
    file.take(64).read_to_end(&mut head).map_err(|e| format!("cannot be read: {}", io_words(&e)))?;
    if let Some(other) = something_else(&head) {
        return Err(format!("{other}; a safetensors file was wanted"));
    }
    let Some(Ok(length)) = head.get(..8).map(<[u8; 8]>::try_from) else {
        return Err(format!("has {file_len} bytes; a safetensors file has at least 8"));
    };
    let header_len = u64::from_le_bytes(length);
    if header_len > HEADER_BYTES_MAX {
        return Err(format!("announces a header of {header_len} bytes; at most {HEADER_BYTES_MAX} are read"));
    }
    if header_len > file_len - 8 {
        return Err(format!(
            "is truncated: the header alone wants {header_len} bytes, the file has {file_len}"
        ));
    }
    let mut header = vec![0; header_len as usize];
    file.read_exact_at(&mut header, 8).map_err(|e| format!("cannot be read: {}", io_words(&e)))?;
    if header.first() != Some(&b'{') {
        return Err("is not a safetensors file: its header does not begin with `{`".into());
    }
    Ok(header)
}

/// What people put where weights belong, by its first bytes.
fn something_else(head: &[u8]) -> Option<&'static str> {
    let text = head.trim_ascii_start().to_ascii_lowercase();
    let starts = |magic: &[u8]| head.starts_with(magic);
    if starts(b"PK\x03\x04") {
        return Some("is a zip archive, most likely a PyTorch pickle (convert it to safetensors)");
    }
    if starts(b"\x80\x02") || starts(b"\x80\x03") || starts(b"\x80\x04") || starts(b"\x80\x05") {
        return Some("is a Python pickle (convert it to safetensors)");
    }
    if starts(b"version https://git-lfs") {
        return Some("is a git-lfs pointer, not the weights it points to (run `git lfs pull`)");
    }
    if text.starts_with(b"<!doctype") || text.starts_with(b"<html") || text.starts_with(b"<?xml") {
        return Some("is a web page, most likely the answer to a failed download");
    }
    None
}

type Header = (BTreeMap<String, TensorInfo>, BTreeMap<String, String>);

/// Names, places and free text out of the header's JSON; `data_len` bytes follow the header in the file.
fn parse_header(header: &[u8], data_len: u64) -> Result<Header, String> {
    let mut entries: Map<String, Value> =
        serde_json::from_slice(header).map_err(|e| format!("has a header that is not JSON: {e}"))?;
    let metadata = match entries.remove("__metadata__") {
        None => BTreeMap::new(),
        Some(v) => {
            serde_json::from_value(v).map_err(|e| format!("has bad `__metadata__` in its header: {e}"))?
        }
    };
    let mut infos = BTreeMap::new();
    for (name, entry) in entries {
        let info = check_entry(entry, data_len).map_err(|what| format!("tensor `{name}` {what}"))?;
        infos.insert(name, info);
    }
    // The crate's own check: no holes, no overlaps.
    serde_json::from_slice::<Metadata>(header).map_err(|e| format!("has an inconsistent header: {e}"))?;
    Ok((infos, metadata))
}

/// One tensor's entry, its bytes fitting its shape and lying within the file.
fn check_entry(entry: Value, data_len: u64) -> Result<TensorInfo, String> {
    let info: TensorInfo =
        serde_json::from_value(entry).map_err(|e| format!("has a bad header entry: {e}"))?;
    let (begin, end) = info.data_offsets;
    if end as u64 > data_len {
        return Err(format!(
            "ends at byte {end} of the data, but the file holds {data_len}: it is truncated"
        ));
    }
    let bits = info.shape.iter().try_fold(info.dtype.bitsize(), |n, d| n.checked_mul(*d));
    let wanted = bits.ok_or_else(|| format!("has the impossible shape {:?}", info.shape))? / 8;
    match end.checked_sub(begin) {
        Some(bytes) if bytes == wanted => Ok(info),
        _ => Err(format!(
            "lies at {begin}..{end}, but {:?} of {:?} takes {wanted} bytes",
            info.shape, info.dtype
        )),
    }
}

pub(crate) type Widen = fn(&[u8], &mut [f32]);

/// Bytes per element and the conversion to f32, for the types that weights come in.
pub(crate) fn widening(dtype: Dtype) -> Option<(usize, Widen)> {
    match dtype {
        Dtype::F32 => Some((4, |bytes, out| {
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        })),
        Dtype::F64 => Some((8, |bytes, out| {
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(8)) {
                *o = f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]) as f32;
            }
        })),
        Dtype::F16 => Some((2, |bytes, out| {
            halves(bytes).reinterpret_cast::<f16>().convert_to_f32_slice(out);
        })),
        Dtype::BF16 => Some((2, |bytes, out| {
            halves(bytes).reinterpret_cast::<bf16>().convert_to_f32_slice(out);
        })),
        _ => None,
    }
}

fn halves(bytes: &[u8]) -> Vec<u16> {
    bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect()
}

/// Writes tensors as a safetensors file, whole or not at all; `dtype` is f32, f16 or bf16.
///
/// See `save_streaming`, which this is for tensors that are already there.
pub fn save(
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
    metadata: &BTreeMap<String, String>,
    dtype: DType,
) -> Result<()> {
    let shapes = tensors.iter().map(|(name, t)| (name.clone(), t.dims().to_vec())).collect();
    save_streaming(path, &shapes, metadata, dtype, |name| Ok(tensors[name].clone()))
}

/// Writes a safetensors file tensor by tensor, asking `tensor` for each in the order of `shapes`, so that no more
/// than one of them need exist at a time.
///
/// The bytes depend on the arguments only. They go to a neighbouring temporary file that takes the wanted name when
/// all is on disk: a reader sees the old file or the new one. [`Error::File`] if `dtype` is not f32, f16 or bf16, a
/// tensor has another shape than announced, or a value does not fit f16.
pub(crate) fn save_streaming(
    path: &Path,
    shapes: &BTreeMap<String, Vec<usize>>,
    metadata: &BTreeMap<String, String>,
    dtype: DType,
    tensor: impl FnMut(&str) -> Result<Tensor>,
) -> Result<()> {
    stream(path, shapes, metadata, None, dtype, tensor)
}

/// As [`save_streaming`], and says in the metadata, as `key`, what all that follows the header hashes to: SHA-256 in
/// lower-case hexadecimal after `0x`.
pub(crate) fn save_streaming_hashed(
    path: &Path,
    shapes: &BTreeMap<String, Vec<usize>>,
    metadata: &BTreeMap<String, String>,
    key: &str,
    dtype: DType,
    tensor: impl FnMut(&str) -> Result<Tensor>,
) -> Result<()> {
    let mut metadata = metadata.clone();
    metadata.insert(key.to_owned(), format!("0x{}", "0".repeat(64))); // as long as what will stand there
    stream(path, shapes, &metadata, Some(key), dtype, tensor)
}

fn stream(
    path: &Path,
    shapes: &BTreeMap<String, Vec<usize>>,
    metadata: &BTreeMap<String, String>,
    hashed: Option<&str>,
    dtype: DType,
    mut tensor: impl FnMut(&str) -> Result<Tensor>,
) -> Result<()> {
    let header = header(shapes, metadata, dtype)
        .ok_or_else(|| Error::file(path, "weights are saved as f32, f16 or bf16"))?;
    write_atomically(path, |out| {
        let mut hash = Sha256::new();
        let failed = |e: std::io::Error| Error::io(path, "cannot be written", e);
        out.write_all(&header).map_err(failed)?;
        for (name, shape) in shapes {
            let bad = |what: String| Error::file(path, format!("tensor `{name}` {what}"));
            let tensor = tensor(name)?;
            if tensor.dims() != shape.as_slice() {
                return Err(bad(format!("was announced as {shape:?} and came as {:?}", tensor.dims())));
            }
            let values =
                tensor.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
            for chunk in values.chunks(CHUNK) {
                let bytes = narrow(chunk, dtype).map_err(bad)?;
                if hashed.is_some() {
                    hash.update(&bytes);
                }
                out.write_all(&bytes).map_err(failed)?;
            }
        }
        if let Some(place) = hashed.and_then(|key| place_of(key, &header)) {
            out.seek(SeekFrom::Start(place)).map_err(failed)?;
            out.write_all(format!("{:x}", hash.finalize()).as_bytes()).map_err(failed)?;
        }
        Ok(())
    })
}

/// Where in a header the digits of the hash begin that it gives as `key`.
fn place_of(key: &str, header: &[u8]) -> Option<u64> {
    let before = format!("{}:\"0x", json!(key)).into_bytes();
    let begin = header.windows(before.len()).position(|bytes| bytes == before)?;
    Some((begin + before.len()) as u64)
}

/// Length and JSON of the header, padded with spaces to a multiple of eight; `None` for a type that is not written.
fn header(
    shapes: &BTreeMap<String, Vec<usize>>,
    text: &BTreeMap<String, String>,
    dtype: DType,
) -> Option<Vec<u8>> {
    let word = match dtype {
        DType::F32 => "F32",
        DType::F16 => "F16",
        DType::BF16 => "BF16",
        _ => return None,
    };
    let mut entries = Map::new();
    if !text.is_empty() {
        entries.insert("__metadata__".into(), json!(text));
    }
    let mut at = 0;
    for (name, shape) in shapes {
        let end = at + shape.iter().product::<usize>() * dtype.size_in_bytes();
        entries.insert(name.clone(), json!({"dtype": word, "shape": shape, "data_offsets": [at, end]}));
        at = end;
    }
    let mut json = Value::Object(entries).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    Some([&(json.len() as u64).to_le_bytes(), json.as_slice()].concat())
}

/// The little-endian bytes of `values` in `dtype`.
fn narrow(values: &[f32], dtype: DType) -> Result<Vec<u8>, String> {
    match dtype {
        DType::F16 => {
            if let Some(v) = values.iter().find(|v| v.is_finite() && f16::from_f32(**v).is_infinite()) {
                return Err(format!("holds {v}, beyond the range of f16; save it as bf16 or f32"));
            }
            Ok(values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect())
        }
        DType::BF16 => Ok(values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect()),
        _ => Ok(values.iter().flat_map(|v| v.to_le_bytes()).collect()),
    }
}

/// Writes a file through a temporary neighbour: it appears under its name complete and on disk, or not at all.
pub(crate) fn write_atomically(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> Result<()>,
) -> Result<()> {
    let failed = |e: std::io::Error| Error::io(path, "cannot be written", e);
    let mut part = path.as_os_str().to_owned();
    part.push(format!(".{}.part", std::process::id()));
    let part = PathBuf::from(part);
    let done = (|| {
        let mut out = BufWriter::with_capacity(1 << 20, File::create(&part).map_err(failed)?);
        write(&mut out)?;
        let file = out.into_inner().map_err(|e| failed(e.into_error()))?;
        file.sync_all().map_err(failed)?;
        fs::rename(&part, path).map_err(failed)?;
        let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(parent).and_then(|dir| dir.sync_all()).map_err(failed)
    })();
    if done.is_err() {
        let _ = fs::remove_file(&part); // the first error is the one worth telling
    }
    done
}
