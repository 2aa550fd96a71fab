//! Reads and writes safetensors files: checked with suspicion when read, whole or not at all when written.
//!
//! A file from elsewhere may be cut off, claim a header of terabytes, or be something else altogether: what the
//! safetensors crate refuses is refused (`header.rs`), before anything is allocated from its numbers.
//! Format: <https://github.com/huggingface/safetensors#format>. Pickles (`.bin`, `.ckpt`) are recognised and refused,
//! never opened. Names and shapes mean nothing here; [`super::weights`] gives them their meaning.
//!
//! Departure: tensors are read by position instead of through a memory map. Everything becomes f32 in memory, so a
//! copy is made in either case; this way the file's pages do not count as the process's memory, and another program
//! that cuts the file short causes an error instead of a SIGBUS.

mod header;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use self::header::Header;
use super::{Error, Result};

/// Elements read and converted at a time, by one thread. The buffer is of one size whatever the tensor's is: an allocator
/// that keeps what was freed has use for it again.
const CHUNK: usize = 1 << 16;

/// An open safetensors file, or the several that an index names: headers checked, tensors still on disk.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    shards: Vec<Shard>,
    /// Each tensor, and the shard that holds it.
    tensors: BTreeMap<String, (usize, TensorInfo)>,
    metadata: BTreeMap<String, String>,
}

/// One of the files.
#[derive(Debug)]
struct Shard {
    path: PathBuf,
    file: File,
    data_start: u64,
}

/// What `*.safetensors.index.json` says.
#[derive(Deserialize)]
struct Index {
    /// Nothing that is needed; the reference wants it to be there.
    #[serde(rename = "metadata")]
    _metadata: Map<String, Value>,
    /// The file of each tensor.
    weight_map: BTreeMap<String, String>,
}

impl TensorFile {
    /// Opens a safetensors file, or all files that an index (`*.json`) beside them names, and checks the headers as
    /// the reference does. [`Error::File`] names the file, and the tensor where there is one.
    pub fn open(path: &Path) -> Result<TensorFile> {
        let paths = if is_index(path) { shards(path)? } else { vec![path.to_owned()] };
        let mut all = TensorFile {
            path: path.to_owned(),
            shards: Vec::new(),
            tensors: BTreeMap::new(),
            metadata: BTreeMap::new(),
        };
        for path in paths {
            let (shard, header) = open_shard(path)?;
            let i = all.shards.len();
            all.tensors.extend(header.infos.into_iter().map(|(name, info)| (name, (i, info))));
            all.metadata.extend(header.metadata);
            all.shards.push(shard);
        }
        Ok(all)
    }

    /// Where the file lies, or the index of several.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Where the file lies that holds this tensor.
    fn path_of(&self, name: &str) -> &Path {
        self.tensors.get(name).map_or(&self.path, |(shard, _)| &self.shards[*shard].path)
    }

    /// The free text pairs of the header.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The shape of a tensor, if there is one of that name.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|(_, info)| info.shape.as_slice())
    }

    /// The type of a tensor, if there is one of that name.
    pub fn dtype(&self, name: &str) -> Option<Dtype> {
        self.tensors.get(name).map(|(_, info)| info.dtype)
    }

    /// One tensor in f32, row-major, from f64, f32, f16, bf16 or f8. [`Error::File`] for other types, a missing
    /// tensor, or a file that has become unreadable.
    pub fn read(&self, name: &str) -> Result<Vec<f32>> {
        let Some((shard, info)) = self.tensors.get(name) else {
            return Err(Error::file(&self.path, format!("tensor `{name}` is missing")));
        };
        let Shard { path, file, data_start } = &self.shards[*shard];
        let (width, widen) = widening(info.dtype).ok_or_else(|| {
            let wanted = "F32, F16, BF16, F64, F8_E4M3 or F8_E5M2 is wanted";
            Error::file(path, format!("tensor `{name}` has type {:?}; {wanted}", info.dtype))
        })?;
        let start = data_start + info.data_offsets.0 as u64;
        let mut values = vec![0f32; info.shape.iter().product()];
        values
            .par_chunks_mut(CHUNK)
            .enumerate()
            .try_for_each(|(i, out)| {
                let mut buffer = vec![0u8; CHUNK * width];
                let bytes = &mut buffer[..out.len() * width];
                file.read_exact_at(bytes, start + (i * CHUNK * width) as u64)?;
                widen(bytes, out);
                Ok(())
            })
            .map_err(|e: std::io::Error| Error::io(path, &format!("tensor `{name}` cannot be read"), e))?;
        Ok(values)
    }

    /// As [`TensorFile::read`] for weights, which have to be numbers: [`Error::File`] as well if one is infinite or
    /// not a number.
    pub fn read_finite(&self, name: &str) -> Result<Vec<f32>> {
        finite(self.read(name)?, self.path_of(name), name)
    }

    /// What is wrong with the values of these tensors, in one line, if some are infinite or not a number.
    /// [`Error::File`] as for [`TensorFile::read`].
    pub fn faulty_values<'a>(&self, names: impl Iterator<Item = &'a str>) -> Result<Option<String>> {
        let (mut n_values, mut faulty) = (0, Vec::new());
        for name in names {
            let n = not_finite(&self.read(name)?);
            n_values += n;
            faulty.extend((n > 0).then_some(name));
        }
        Ok(faulty.first().map(|first| not_finite_words(n_values, faulty.len(), first)))
    }
}

/// The values of a tensor in a file; [`Error::File`] if one is infinite or not a number.
pub(crate) fn finite(values: Vec<f32>, path: &Path, name: &str) -> Result<Vec<f32>> {
    match not_finite(&values) {
        0 => Ok(values),
        n => Err(Error::file(path, not_finite_words(n, 1, name))),
    }
}

/// How many values are infinite or not a number.
fn not_finite(values: &[f32]) -> usize {
    values.par_chunks(CHUNK).map(|chunk| chunk.iter().filter(|v| !v.is_finite()).count()).sum()
}

fn not_finite_words(n_values: usize, n_tensors: usize, first: &str) -> String {
    let values = if n_values == 1 { "value that is" } else { "values that are" };
    match n_tensors {
        1 => format!("tensor `{first}` has {n_values} {values} infinite or not a number"),
        n => format!(
            "has {n_values} {values} infinite or not a number, in {n} tensors, the first in `{first}`"
        ),
    }
}

/// Whether a path is that of an index of several files.
pub(crate) fn is_index(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "json")
}

/// The files that an index names, each once, in the order of their names. [`Error::File`] if one is not beside it.
pub(crate) fn shards(index: &Path) -> Result<Vec<PathBuf>> {
    let text = fs::read_to_string(index).map_err(|e| Error::io(index, "cannot be read", e))?;
    let parsed: Index = serde_json::from_str(&text)
        .map_err(|e| Error::file_from(index, format!("is not an index of safetensors files: {e}"), e))?;
    let names: BTreeSet<String> = parsed.weight_map.into_values().collect();
    if names.is_empty() {
        return Err(Error::file(index, "names no file"));
    }
    let beside = |name: String| {
        let plain = Path::new(&name).file_name().is_some_and(|file| file == name.as_str());
        let path = index.with_file_name(&name);
        if !plain {
            return Err(Error::file(index, format!("names `{name}`, which is not a file beside it")));
        }
        if path.exists() { Ok(path) } else { Err(Error::file(path, "is missing; the index names it")) }
    };
    names.into_iter().map(beside).collect()
}

fn open_shard(path: PathBuf) -> Result<(Shard, Header)> {
    let file = File::open(&path).map_err(|e| Error::io(&path, "cannot be opened", e))?;
    let about = file.metadata().map_err(|e| Error::io(&path, "cannot be read", e))?;
    if !about.is_file() {
        return Err(Error::file(&path, "is not a file; a safetensors file is wanted"));
    }
    let header = Header::read(&file, about.len()).map_err(|what| Error::file(&path, what))?;
    Ok((Shard { path, file, data_start: header.data_start }, header))
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
            halves(bytes, out, |bits, out| bits.reinterpret_cast::<f16>().convert_to_f32_slice(out));
        })),
        Dtype::BF16 => Some((2, |bytes, out| {
            halves(bytes, out, |bits, out| bits.reinterpret_cast::<bf16>().convert_to_f32_slice(out));
        })),
        Dtype::F8_E5M2 => Some((1, |bytes, out| {
            out.iter_mut().zip(bytes).for_each(|(o, b)| *o = f16::from_bits(u16::from(*b) << 8).to_f32());
        })),
        Dtype::F8_E4M3 => Some((1, |bytes, out| {
            out.iter_mut().zip(bytes).for_each(|(o, b)| *o = e4m3(*b));
        })),
        _ => None,
    }
}

/// Four bits of exponent, three of mantissa; no infinity, and one pattern that is no number (arXiv 2209.05433).
fn e4m3(bits: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    let size = match (exponent, bits & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-9),
        _ => (8.0 + mantissa) * 2f32.powi(exponent - 10),
    };
    if bits & 128 == 0 { size } else { -size }
}

/// Converts values of two bytes each, a few at a time.
fn halves(bytes: &[u8], out: &mut [f32], convert: fn(&[u16], &mut [f32])) {
    let mut bits = [0; 1024];
    for (bytes, out) in bytes.chunks(2 * bits.len()).zip(out.chunks_mut(bits.len())) {
        let bits = &mut bits[..out.len()];
        bits.iter_mut().zip(bytes.chunks_exact(2)).for_each(|(h, b)| *h = u16::from_le_bytes([b[0], b[1]]));
        convert(bits, out);
    }
}

/// The metadata without which diffusers and transformers refuse a file.
pub(crate) fn torch_metadata() -> BTreeMap<String, String> {
    BTreeMap::from([("format".to_owned(), "pt".to_owned())])
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
/// tensor has another shape than announced, or a value is beyond the range of f16 or bf16.
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
    let beyond =
        |rounded: fn(f32) -> f32| values.iter().find(|v| v.is_finite() && rounded(**v).is_infinite());
    match dtype {
        DType::F16 => match beyond(|v| f16::from_f32(v).to_f32()) {
            Some(v) => Err(format!("holds {v}, beyond the range of f16; save it as bf16 or f32")),
            None => Ok(values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect()),
        },
        DType::BF16 => match beyond(|v| bf16::from_f32(v).to_f32()) {
            Some(v) => Err(format!("holds {v}, beyond the range of bf16; save it as f32")),
            None => Ok(values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect()),
        },
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
