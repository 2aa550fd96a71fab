//! PyTorch's pickles: both containers hold the tensors that PyTorch put into them, code is refused by its name, and no
//! bytes whatever make the reader panic or allocate without bound. Goldens: `tests/golden/pickles.py`.

use std::fs;
use std::path::{Path, PathBuf};

use hypnos::ml::pickle::PickleFile;
use hypnos::ml::random;
use hypnos::ml::tensorfile::TensorFile;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/pickles").join(name)
}

#[test]
fn both_containers_hold_what_pytorch_saved() {
    let values = TensorFile::open(&golden("values.safetensors")).unwrap();
    for container in ["archive.pth", "stream.pth"] {
        let file = PickleFile::open(&golden(container)).unwrap();
        for name in values.names() {
            assert_eq!(file.shape(name), values.shape(name), "{container}: {name}");
            assert_eq!(file.read(name).unwrap(), values.read(name).unwrap(), "{container}: {name}");
        }
        // One more: the count of batches, whose type is no float.
        assert_eq!(file.names().count(), values.names().count() + 1, "{container}");
        assert_eq!(file.shape("norm.num_batches_tracked"), Some([].as_slice()));
        let error = file.read("norm.num_batches_tracked").unwrap_err().to_string();
        assert!(error.ends_with("has type I64; F32, F16, BF16 or F64 is wanted"), "{error}");
        assert!(file.read("other").unwrap_err().to_string().ends_with("tensor `other` is missing"));
    }
}

#[track_caller]
fn refused(path: &Path, wanted: &str) {
    let error = PickleFile::open(path).unwrap_err().to_string();
    assert!(error.starts_with(&format!("{}: ", path.display())) && error.lines().count() == 1, "{error}");
    assert!(error.contains(wanted), "{error}\nwanted {wanted}");
}

#[test]
fn code_is_refused_by_its_name() {
    refused(&golden("code.pth"), "holds code: it names `posix.getcwd`, which tensors do not need");
    refused(&golden("module.pth"), "holds code: it names `torch.nn.modules.linear.Linear`");
    refused(&golden("script.pth"), "is a TorchScript archive, which holds code");
}

#[test]
fn what_is_no_dictionary_of_tensors_is_refused_in_one_line() {
    refused(&golden("list.pth"), "holds no dictionary; a dictionary of tensors is wanted");
    refused(&golden("protocol4.pth"), "is of protocol 4 of pickles; 2 is wanted");
    refused(&golden("big_endian.pth"), "has its numbers in big-endian order");
    refused(&golden("values.safetensors"), "is no file of torch.save");
    refused(&golden("none.pth"), "cannot be opened: ");
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        fs::write(dir.path().join(name), bytes).unwrap();
        dir.path().join(name)
    };
    refused(&file("empty", b""), "is no file of torch.save");
    refused(&file("pickle", b"\x80\x02K\x01."), "is a Python pickle, but no file of torch.save");
    refused(&file("zip", b"PK\x03\x04 and no more"), "is a zip archive that cannot be read");
    let whole = fs::read(golden("stream.pth")).unwrap();
    refused(&file("cut", &whole[..whole.len() - 8]), "is truncated");
    refused(&file("short", &whole[..100]), "is cut off");
}

#[test]
fn a_compressed_archive_is_refused_as_one_even_where_its_sizes_are_equal() {
    let mut bytes = fs::read(golden("archive.pth")).unwrap();
    // The method of the first entry, in its own header and in the directory: deflated.
    for (header, at) in [(b"PK\x03\x04", 8), (b"PK\x01\x02", 10)] {
        let begin = bytes.windows(4).position(|four| four == header).unwrap();
        assert_eq!(bytes[begin + at], 0, "stored");
        bytes[begin + at] = 8;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("deflated");
    fs::write(&path, bytes).unwrap();
    refused(&path, "data.pkl compressed");
}

#[test]
fn names_and_keys_of_megabytes_are_shortened_in_messages() {
    let long = [&(1_u32 << 20).to_le_bytes()[..], &vec![b'x'; 1 << 20]].concat();
    let head =
        b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}U\x0dlittle_endian\x88s.";
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("long");
    let said = |object: &[&[u8]]| {
        fs::write(&path, [&head[..], &object.concat()].concat()).unwrap();
        let error = PickleFile::open(&path).unwrap_err().to_string();
        assert!(error.len() < 1000, "{} bytes: {}", error.len(), &error[..1000]);
        error
    };
    let storage =
        [b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX", &long[..], b"U\x03cpuK\x02NtQ"].concat();
    let tensor =
        [b"ctorch._utils\n_rebuild_tensor_v2\n", &storage[..], b"K\x00K\x02\x85K\x01\x85\x89NtRs."].concat();
    // A long name, and a storage that is not in the file; then a long key of a storage that is cut off.
    let named = said(&[b"\x80\x02}X", &long, &tensor, b"\x80\x02]."]);
    assert!(named.ends_with("x` has no storage in the file"), "{named}");
    let keyed = said(&[b"\x80\x02}U\x01w", &tensor, b"\x80\x02]X", &long, b"a."]);
    assert!(keyed.ends_with("x` is missing: the file is truncated"), "{keyed}");
}

/// A pickle of few bytes that claims much, or would grow without bound if values were copied.
#[test]
fn small_pickles_with_large_claims_are_refused() {
    let magic =
        b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}U\x0dlittle_endian\x88s."
            .to_vec();
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, object: &[u8]| {
        fs::write(dir.path().join(name), [&magic, object].concat()).unwrap();
        dir.path().join(name)
    };
    refused(&file("text", b"\x80\x02X\xff\xff\xff\xff"), "has a pickle that is cut off");
    // Twice as many values at each step, 2^1000 of them.
    let doubling =
        [b"\x80\x02]q\x00".as_slice(), &b"(h\x00h\x00tq\x00".repeat(1000), b".\x80\x02]."].concat();
    refused(&file("doubling", &doubling), "holds no dictionary");
    // A list that is made into a dictionary again and again.
    let pairs =
        [b"\x80\x02]q\x00(".as_slice(), &b"NN\x86".repeat(60_000), b"eccollections\nOrderedDict\nq\x01"]
            .concat();
    let again = [pairs, b"h\x01h\x00\x85R".repeat(60_000), b".\x80\x02].".to_vec()].concat();
    let opened = PickleFile::open(&file("again", &again));
    assert!(opened.is_err());
    refused(
        &file("values", &[b"\x80\x02".as_slice(), &vec![b'N'; 300_000]].concat()),
        "has more than 262144 values",
    );
    // A tensor of 2^60 numbers in a storage of 2.
    let tensor = b"\x80\x02}U\x01wctorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x02N\
        tQK\x00\x8a\x08\x00\x00\x00\x00\x00\x00\x00\x10\x85K\x00\x85\x89NtRs.\x80\x02]U\x010a.\
        \x02\x00\x00\x00\x00\x00\x00\x00\x00\x00\x80?\x00\x00\x80?";
    refused(
        &file("tensor", tensor),
        "tensor `w` is [1152921504606846976] with strides [0] from 0 on, but its storage has 2",
    );
    // The storage of 2 numbers a second time, as one of 2^61 or of another type: the file can be only one of them.
    let tensor = |name: &[u8], kind: &[u8], n: &[u8]| {
        let storage = [b"((U\x07storagectorch\n".as_slice(), kind, b"\nU\x010U\x03cpu", n, b"NtQ"].concat();
        let rest = [b"K\x00".as_slice(), n, b"\x85K\x01\x85\x89NtRs"].concat();
        [b"U\x01".as_slice(), name, b"ctorch._utils\n_rebuild_tensor_v2\n", &storage, &rest].concat()
    };
    let end = b".\x80\x02]U\x010a.\x02\x00\x00\x00\x00\x00\x00\x00\x00\x00\x80?\x00\x00\x80?";
    let honest = tensor(b"v", b"FloatStorage", b"K\x02");
    for (name, kind, n, said) in [
        (
            "size",
            &b"FloatStorage"[..],
            &b"\x8a\x08\x00\x00\x00\x00\x00\x00\x00\x20"[..],
            "2305843009213693952 numbers of F32",
        ),
        ("type", b"DoubleStorage", b"K\x02", "2 numbers of F64"),
    ] {
        let other = tensor(b"w", kind, n);
        let object = [b"\x80\x02}".as_slice(), &other, &honest, end].concat();
        refused(&file(name, &object), &format!("has the storage `0` twice: {said} and 2 numbers of F32"));
    }
    assert!(most_memory_mib() < 1024, "{} MiB", most_memory_mib());
}

/// The goldens with bytes changed, inserted and cut off at random: each is read, or refused in words.
#[test]
fn no_bytes_make_the_reader_panic() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mutant.pth");
    let originals = ["archive.pth", "stream.pth", "code.pth"].map(|name| fs::read(golden(name)).unwrap());
    let mut n_read = 0;
    for round in 0..3000_u64 {
        let mut i = 0;
        let mut draw = |n: usize| {
            i += 1;
            random::below(1, round, i, n)
        };
        let mut bytes = originals[draw(originals.len())].clone();
        for _ in 0..=draw(4) {
            let at = draw(bytes.len());
            // Few of the files whose bytes are moved are read.
            match draw(12) {
                0..=2 => bytes[at] = draw(256) as u8,
                3..=5 => bytes[at] ^= 1 << draw(8),
                6..=8 => bytes[at] = [0, 0xff, 0x7f, 0x80][draw(4)],
                9 => bytes.insert(at, draw(256) as u8),
                10 if bytes.len() > 1 => drop(bytes.remove(at)),
                _ => bytes.truncate(at.max(1)),
            }
        }
        fs::write(&path, &bytes).unwrap();
        match PickleFile::open(&path) {
            Ok(file) => {
                n_read += 1;
                for name in file.names() {
                    // What is allocated for a tensor is bounded by the file, whatever its shape says.
                    let n: usize = file.shape(name).unwrap().iter().product();
                    assert!(n <= bytes.len(), "{name}: {n}");
                    let _ = file.read(name);
                }
            }
            Err(error) => assert_eq!(error.to_string().lines().count(), 1, "{error}"),
        }
    }
    assert!((100..2900).contains(&n_read), "{n_read} of 3000 were read: the mutants say too little");
    assert!(most_memory_mib() < 1024, "{} MiB", most_memory_mib());
}

/// The most address space that this process has had. nextest runs each test in a process of its own.
fn most_memory_mib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPeak:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
}
