//! The container of `torch.save` before PyTorch 1.6: five pickles one after the other (a magic number, the version, the
//! machine's properties, the object, the keys of its storages), then each storage, its length first.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use super::machine::{self, Heap, Storage, Tensor, shown};
use super::tensor::{Stored, bytes};
use super::{Contents, PICKLE_BYTES_MAX};
use crate::error::io_words;

/// The magic number 0x1950a86a20f9469cfc6c, as the first pickle has it.
const MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];

/// The version of the container, which never changed.
const VERSION: i64 = 1001;

pub(super) fn read(file: &mut File, file_len: u64) -> Result<Contents, String> {
    let mut head = Vec::new();
    let unreadable = |e: std::io::Error| format!("cannot be read: {}", io_words(&e));
    file.seek(SeekFrom::Start(0)).map_err(unreadable)?;
    file.take(PICKLE_BYTES_MAX).read_to_end(&mut head).map_err(unreadable)?;
    let mut pickles = Pickles { bytes: &head, at: 0 };
    if pickles.pickle()?.number().as_deref() != Some(MAGIC.as_slice()) {
        return Err("is a Python pickle, but no file of torch.save".into());
    }
    let version = pickles.pickle()?.int();
    if version != Some(VERSION) {
        let version = version.map_or("no number".into(), |version| version.to_string());
        return Err(format!("has {version} as its version of torch.save; {VERSION} is wanted"));
    }
    if pickles.pickle()?.flag("little_endian") != Some(true) {
        return Err("has its numbers in big-endian order; little-endian is wanted".into());
    }
    let object = pickles.pickle()?;
    let keys = pickles.pickle()?;
    let tensors = object.tensors()?;
    let begins = begins(file, file_len, pickles.at as u64, &keys.texts()?, &object.storages()?)?;
    let place = |(name, tensor): &(&str, Tensor<'_>)| {
        let bad = |what: String| format!("tensor `{}` {what}", shown(name));
        let begin = begins.get(tensor.storage.key).ok_or_else(|| bad("has no storage in the file".into()))?;
        Ok::<_, String>(((*name).to_owned(), Stored::new(tensor, *begin).map_err(bad)?))
    };
    let tensors = tensors.iter().map(place).collect::<Result<_, String>>()?;
    Ok((tensors, object.ints()))
}

/// The pickles at the beginning of the file.
struct Pickles<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Pickles<'a> {
    fn pickle(&mut self) -> Result<Heap<'a>, String> {
        let heap = machine::run(&self.bytes[self.at..])?;
        self.at += heap.n_read();
        Ok(heap)
    }
}

/// Where the values of each storage begin, by its key; the first one's length is at `at`.
fn begins(
    file: &File,
    file_len: u64,
    mut at: u64,
    keys: &[&str],
    storages: &HashMap<&str, Storage<'_>>,
) -> Result<HashMap<String, u64>, String> {
    let mut begins = HashMap::new();
    for key in keys {
        let bad = |what: &str| format!("storage `{}` {what}", shown(key));
        let storage =
            storages.get(key).ok_or_else(|| bad("is in the list of storages, but no tensor names it"))?;
        let mut length = [0; 8];
        file.read_exact_at(&mut length, at).map_err(|_| bad("is missing: the file is truncated"))?;
        let (n, wanted) = (u64::from_le_bytes(length), storage.n as u64);
        if n != wanted {
            return Err(bad(&format!("has {n} numbers in the file; its tensor says {wanted}")));
        }
        let end = bytes(storage).and_then(|bytes| at.checked_add(8)?.checked_add(bytes));
        let end =
            end.filter(|end| *end <= file_len).ok_or_else(|| bad("is cut off: the file is truncated"))?;
        begins.insert((*key).to_owned(), at + 8);
        at = end;
    }
    Ok(begins)
}
