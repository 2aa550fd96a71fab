//! The container of `torch.save` since PyTorch 1.6: a zip archive with the pickle in `*/data.pkl` and each storage in
//! `*/data/KEY`, uncompressed.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek};

use zip::read::ZipFile;
use zip::{CompressionMethod, ZipArchive};

use super::machine::{self, Tensor, shown};
use super::tensor::{Stored, bytes};
use super::{Contents, PICKLE_BYTES_MAX};

pub(super) fn read(file: &File, file_len: u64) -> Result<Contents, String> {
    let mut archive =
        ZipArchive::new(file).map_err(|e| format!("is a zip archive that cannot be read: {e}"))?;
    let root = root(&archive)?;
    let pickle = contents(&mut archive, &format!("{root}data.pkl"), PICKLE_BYTES_MAX)?;
    let byte_order = format!("{root}byteorder");
    if archive.index_for_name(&byte_order).is_some() && contents(&mut archive, &byte_order, 16)? != b"little"
    {
        return Err("has its numbers in big-endian order; little-endian is wanted".into());
    }
    let heap = machine::run(&pickle)?;
    let tensors = heap.tensors()?;
    heap.storages()?; // two of one key that differ would not both be checked below
    let mut begins = HashMap::new();
    let place = |(name, tensor): (&str, Tensor<'_>)| {
        let bad = |what: String| format!("tensor `{}` {what}", shown(name));
        let key = tensor.storage.key;
        let begin = if let Some(begin) = begins.get(key) {
            *begin
        } else {
            let wanted = bytes(&tensor.storage)
                .ok_or_else(|| bad("has a storage of more bytes than a file can have".into()))?;
            let begin = storage(&mut archive, &format!("{root}data/{key}"), wanted, file_len).map_err(bad)?;
            begins.insert(key.to_owned(), begin);
            begin
        };
        Ok::<_, String>((name.to_owned(), Stored::new(&tensor, begin).map_err(bad)?))
    };
    let tensors = tensors.into_iter().map(place).collect::<Result<_, String>>()?;
    Ok((tensors, heap.ints()))
}

/// The directory of everything in the archive, with a slash behind it: `archive/`, or the file's name when it was
/// saved.
fn root<R: Read + Seek>(archive: &ZipArchive<R>) -> Result<String, String> {
    let mut root = None;
    for name in archive.file_names() {
        let name = name.map_err(|e| format!("is a zip archive with a name that cannot be read: {e}"))?;
        if name.ends_with("/constants.pkl") {
            return Err(
                "is a TorchScript archive, which holds code; a dictionary of tensors is wanted".into()
            );
        }
        if let Some(before) = name.strip_suffix("data.pkl").filter(|before| before.ends_with('/')) {
            root = Some(before.to_owned());
        }
    }
    root.ok_or_else(|| "is a zip archive without data.pkl: it is no file of torch.save".into())
}

/// All of a small file in the archive.
fn contents<R: Read + Seek>(archive: &mut ZipArchive<R>, name: &str, max: u64) -> Result<Vec<u8>, String> {
    let entry = entry(archive, name)?;
    let size = entry.size();
    if size > max {
        return Err(format!("has {} of {size} bytes; at most {max} are read", shown(name)));
    }
    let mut all = Vec::new();
    let read = entry.take(max).read_to_end(&mut all);
    read.map_err(|e| format!("has {}, which cannot be read: {e}", shown(name)))?;
    Ok(all)
}

/// Where the values of a storage begin in the file; there have to be `wanted` bytes of them.
fn storage<R: Read + Seek>(
    archive: &mut ZipArchive<R>,
    name: &str,
    wanted: u64,
    file_len: u64,
) -> Result<u64, String> {
    let entry = entry(archive, name)?;
    let (size, begin) = (entry.size(), entry.data_start());
    // What the directory of the archive says of the size is checked against the file's as well.
    let begin = begin.filter(|begin| begin.checked_add(wanted).is_some_and(|end| end <= file_len));
    let name = shown(name);
    match begin {
        Some(begin) if size == wanted => Ok(begin),
        Some(_) => Err(format!("wants {wanted} bytes of {name}, which has {size}")),
        None => Err(format!("wants {wanted} bytes of {name}, which ends beyond the file: it is truncated")),
    }
}

fn entry<'a, R: Read + Seek>(archive: &'a mut ZipArchive<R>, name: &str) -> Result<ZipFile<'a, R>, String> {
    let unreadable = |e: &dyn std::fmt::Display| format!("has no readable {}: {e}", shown(name));
    let index = archive.index_for_name(name).ok_or_else(|| unreadable(&"it is not in the archive"))?;
    let raw = archive.by_index_raw(index).map_err(|e| unreadable(&e))?;
    if raw.compression() != CompressionMethod::Stored || raw.size() != raw.compressed_size() {
        return Err(format!("has {} compressed; torch.save leaves it as it is", shown(name)));
    }
    drop(raw);
    archive.by_index(index).map_err(|e| unreadable(&e))
}
