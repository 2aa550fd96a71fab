//! Tensors as `torch.save` writes them, in both of its containers.

use std::io::{Cursor, Write};

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::Tensors;

/// A zip archive, as PyTorch writes since 1.6.
pub(crate) fn archive(tensors: &Tensors) -> Vec<u8> {
    let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let mut put = |name: &str, bytes: &[u8]| {
        zip.start_file(format!("archive/{name}"), stored).unwrap();
        zip.write_all(bytes).unwrap();
    };
    put("data.pkl", &pickle(tensors, false));
    put("byteorder", b"little");
    for (i, (_, values)) in tensors.values().enumerate() {
        put(&format!("data/{i}"), &little_endian(values));
    }
    put("version", b"3\n");
    zip.finish().unwrap().into_inner()
}

/// A stream, as PyTorch wrote before, with the names that Python 2 gives: LPIPS's heads are published so.
pub(crate) fn stream(tensors: &Tensors) -> Vec<u8> {
    let mut bytes = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.".to_vec();
    bytes.extend(b"\x80\x02}(U\x10protocol_versionM\xe9\x03U\x0dlittle_endian\x88u.");
    bytes.extend(pickle(tensors, true));
    bytes.extend(b"\x80\x02](");
    for i in 0..tensors.len() {
        text(&mut bytes, &i.to_string(), true);
    }
    bytes.extend(b"e.");
    for (_, values) in tensors.values() {
        bytes.extend((values.len() as u64).to_le_bytes());
        bytes.extend(little_endian(values));
    }
    bytes
}

/// The dictionary of tensors; storages are named by their numbers.
fn pickle(tensors: &Tensors, by_python_2: bool) -> Vec<u8> {
    let mut bytes = b"\x80\x02".to_vec();
    // Python 3 fills a dictionary; Python 2 makes an ordered one out of a list of pairs.
    bytes.extend(if by_python_2 { b"ccollections\nOrderedDict\n](".as_slice() } else { b"}(" });
    for (i, (name, (shape, values))) in tensors.iter().enumerate() {
        bytes.extend(if by_python_2 { b"](".as_slice() } else { b"" });
        text(&mut bytes, name, by_python_2);
        bytes.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut bytes, "storage", by_python_2);
        bytes.extend(b"ctorch\nFloatStorage\n");
        text(&mut bytes, &i.to_string(), by_python_2);
        text(&mut bytes, "cuda:0", by_python_2);
        number(&mut bytes, values.len());
        bytes.extend(if by_python_2 { b"NtQK\x00".as_slice() } else { b"tQK\x00" });
        let strides = (0..shape.len()).map(|axis| shape[axis + 1..].iter().product::<usize>());
        for sizes in [shape.clone(), strides.collect()] {
            bytes.push(b'(');
            sizes.into_iter().for_each(|size| number(&mut bytes, size));
            bytes.push(b't');
        }
        bytes.extend(b"\x89NtR");
        bytes.extend(if by_python_2 { b"e".as_slice() } else { b"" });
    }
    bytes.extend(if by_python_2 { b"e\x85R.".as_slice() } else { b"u." });
    bytes
}

fn text(bytes: &mut Vec<u8>, text: &str, by_python_2: bool) {
    if by_python_2 {
        bytes.extend([b'U', text.len() as u8]);
    } else {
        bytes.push(b'X');
        bytes.extend((text.len() as u32).to_le_bytes());
    }
    bytes.extend(text.as_bytes());
}

fn number(bytes: &mut Vec<u8>, n: usize) {
    bytes.push(b'J');
    bytes.extend((n as i32).to_le_bytes());
}

fn little_endian(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}
