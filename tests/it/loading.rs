//! What is accepted and refused, against the verdicts of the reference's own readers: `tests/golden/loading.py`, which makes
//! the cases here and, into a directory that `HYPNOS_GOLDENS` names, many more.

use std::collections::BTreeMap;
use std::fs;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::thread;

use candle_core::{DType, Device};
use hypnos::ml::bundle::{Bundle, check};
use hypnos::ml::models::vae::{self, Vae};
use hypnos::ml::precision::Precision;
use hypnos::ml::sample::{ImageRequest, Models, SampleSettings, initial_noise, latents};
use hypnos::ml::samplers::Sampler;
use hypnos::ml::tensorfile::TensorFile;
use hypnos::ml::tokenizer::Tokenizer;
use hypnos::ml::weights::Weights;
use hypnos::ml::{Interrupt, Result};
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

/// The rows of a golden.
fn rows(name: &str) -> Vec<Value> {
    let text = fs::read_to_string(crate::golden::path("loading").join(name)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Fails if any case differs, and shows the first few that do.
fn agreed(what: &str, n: usize, wrong: &[String]) {
    let shown = wrong[..wrong.len().min(16)].join("\n");
    assert!(wrong.is_empty(), "{} of {n} {what} differ:\n{shown}", wrong.len());
    eprintln!("{n} {what} agree"); // the runner keeps it unless it is asked
}

/// One byte for each character.
fn bytes(text: &str) -> Vec<u8> {
    text.chars().map(|c| u8::try_from(u32::from(c)).unwrap()).collect()
}

#[test]
fn a_header_is_accepted_where_the_reference_accepts_it() {
    let (dir, cases) = (tempfile::tempdir().unwrap(), rows("headers.jsonl"));
    assert!(cases.len() >= 2000, "{} headers", cases.len());
    let path = dir.path().join("x.safetensors");
    let mut wrong = Vec::new();
    for case in &cases {
        let n = |key: &str| case[key].as_u64().unwrap() as usize;
        let length = case["length"].as_u64().map_or(Vec::new(), |length| length.to_le_bytes().to_vec());
        let header = bytes(case["header"].as_str().unwrap());
        let file = [length, header, vec![b' '; n("spaces")], vec![0; n("zeros")]].concat();
        fs::write(&path, file).unwrap();
        let opened = TensorFile::open(&path);
        if opened.is_ok() != case["loads"].as_bool().unwrap() {
            wrong.push(format!("{case}\n  ours: {:?}", opened.map(|_| "opened").map_err(|e| e.to_string())));
        } else if let Err(error) = opened {
            let said = error.to_string();
            assert!(!said.contains('\n') && error.is_input(), "{case}: {said}");
            let looks_like_a_length = case["length"].is_u64() && said.contains("pickle");
            assert!(!looks_like_a_length, "{case}: {said}");
        }
    }
    agreed("headers", cases.len(), &wrong);
}

/// The vocabulary of the small bundle in a form that transformers saves.
fn write_vocabulary(dir: &Path, form: &str, sections: &Value) {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bundle/tokenizer");
    let read = |name: &str| fs::read_to_string(from.join(name)).unwrap();
    if form == "files" || form == "both" {
        for name in ["vocab.json", "merges.txt"] {
            fs::write(dir.join(name), read(name)).unwrap();
        }
    }
    if form == "files" {
        return;
    }
    let vocab: Value = serde_json::from_str(&read("vocab.json")).unwrap();
    let merges = read("merges.txt");
    let merges = merges.lines().filter(|line| !line.starts_with('#'));
    let merges: Vec<Value> = merges
        .map(|line| match form {
            "strings" => json!(line),
            _ => json!(line.split(' ').collect::<Vec<_>>()),
        })
        .collect();
    let mut whole = sections.clone();
    whole["model"] = json!({
        "type": "BPE", "dropout": null, "unk_token": "<|endoftext|>", "continuing_subword_prefix": "",
        "end_of_word_suffix": "</w>", "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
        "vocab": vocab, "merges": merges,
    });
    fs::write(dir.join("tokenizer.json"), whole.to_string()).unwrap();
}

#[test]
fn a_tokenizer_in_any_form_has_the_ids_of_the_reference() {
    let mut cases = rows("tokenizers.jsonl");
    let texts = cases.remove(0)["texts"].clone();
    let texts: Vec<&str> = texts.as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect();
    let mut wrong = Vec::new();
    for case in &cases {
        let dir = tempfile::tempdir().unwrap();
        write_vocabulary(dir.path(), case["form"].as_str().unwrap(), &case["sections"]);
        for (name, text) in case["files"].as_object().unwrap() {
            fs::write(dir.path().join(name), text.as_str().unwrap()).unwrap();
        }
        let ours = Tokenizer::open(dir.path());
        let encoded = |ours: &Tokenizer| texts.iter().map(|text| ours.encode(text)).collect::<Vec<_>>();
        let ids = ours.as_ref().ok().map(encoded);
        // A start, end or padding that no file numbers is a new token for the reference, and none for us.
        let wanted = if case["unnumbered"] == true { json!(null) } else { case["ids"].clone() };
        let size = ours.as_ref().ok().map(Tokenizer::vocab_size);
        if json!(ids) != wanted || (!wanted.is_null() && json!(size) != case["size"]) {
            let ours = ours.map(|_| (size, ids)).map_err(|e| e.to_string());
            wrong.push(format!("{case}\n  ours: {ours:?}"));
        }
    }
    agreed("tokenizers", cases.len(), &wrong);
}

/// Tensors of a file, as they lie there.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn read_tensors(path: &Path) -> Tensors {
    let file = fs::read(path).unwrap();
    let all = SafeTensors::deserialize(&file).unwrap();
    let one = |(name, view): (String, TensorView<'_>)| {
        (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
    };
    all.tensors().into_iter().map(one).collect()
}

fn write_tensors(path: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(name, (dtype, shape, data))| {
        (name.clone(), TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    let text = [("format".to_owned(), "pt".to_owned())].into();
    fs::write(path, serialize(views, Some(text)).unwrap()).unwrap();
}

/// A weight's values, as `filled` of the script has them.
fn filled(name: &str, shape: &[usize]) -> (Dtype, Vec<usize>, Vec<u8>) {
    let n: usize = shape.iter().product();
    let value = |i: usize| (((i * 37 + name.chars().count() * 101) % 199) as f32 - 99.0) / 1000.0;
    (Dtype::F32, shape.to_vec(), (0..n).flat_map(|i| value(i).to_le_bytes()).collect())
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// f32 in another type, rounded as torch rounds.
fn cast(value: f32, to: Dtype) -> Vec<u8> {
    match to {
        Dtype::F16 => half::f16::from_f32(value).to_le_bytes().into(),
        Dtype::BF16 => half::bf16::from_f32(value).to_le_bytes().into(),
        Dtype::F64 => f64::from(value).to_le_bytes().into(),
        Dtype::I64 => (value as i64).to_le_bytes().into(),
        Dtype::F8_E5M2 => vec![nearest(value, |bits| half::f16::from_bits(u16::from(bits) << 8).to_f32())],
        Dtype::F8_E4M3 => vec![nearest(value, |bits| {
            let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7) / 8.0);
            let size = match exponent {
                0 => mantissa * 2f32.powi(-6),
                15 if bits & 7 == 7 => f32::NAN,
                _ => (1.0 + mantissa) * 2f32.powi(exponent - 7),
            };
            if bits & 128 == 0 { size } else { -size }
        })],
        _ => value.to_le_bytes().into(),
    }
}

/// The byte whose meaning is nearest; of two, the even one.
fn nearest(value: f32, meaning: impl Fn(u8) -> f32) -> u8 {
    let finite = (0..=255).filter(|bits| meaning(*bits).is_finite());
    let distance = |bits: u8| (f64::from(meaning(bits)) - f64::from(value)).abs();
    let all = finite.filter(|bits| meaning(*bits).is_sign_negative() == value.is_sign_negative());
    all.min_by(|a, b| distance(*a).total_cmp(&distance(*b)).then((a & 1).cmp(&(b & 1)))).unwrap()
}

/// The base of all cases.
fn base(files: &Map<String, Value>) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        fs::create_dir_all(dir.path().join(name).parent().unwrap()).unwrap();
        fs::write(dir.path().join(name), text.as_str().unwrap()).unwrap();
    }
    write_vocabulary(&dir.path().join("tokenizer"), "files", &json!({}));
    let bundle = Bundle::open(dir.path()).unwrap();
    let [text, unet, vae] = [(); 3].map(|()| Weights::meta());
    bundle.text_encoder_of(&text).unwrap();
    bundle.unet_of(&unet).unwrap();
    let config: vae::Config = serde_json::from_str(files["vae/config.json"].as_str().unwrap()).unwrap();
    Vae::load(&vae, &config).unwrap();
    for (weights, path) in [
        (text, "text_encoder/model.safetensors"),
        (unet, "unet/diffusion_pytorch_model.safetensors"),
        (vae, "vae/diffusion_pytorch_model.safetensors"),
    ] {
        let tensors = weights.params().into_iter().map(|(name, param)| {
            let value = filled(&name, &param.dims());
            (name, value)
        });
        write_tensors(&dir.path().join(path), &tensors.collect());
    }
    dir
}

/// Does to a bundle what the script's `EDITS` do.
fn edit(dir: &Path, edit: &Value) {
    let text = |i: usize| edit[i].as_str().unwrap();
    let path = dir.join(text(1));
    let beside = |name: &str| path.with_file_name(name);
    let set = |key: &str, value: Option<Value>| {
        let mut config: Map<String, Value> = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        match value {
            Some(value) => config.insert(key.to_owned(), value),
            None => config.remove(key),
        };
        fs::write(&path, Value::Object(config).to_string()).unwrap();
    };
    match text(0) {
        "set" => set(text(2), Some(edit[3].clone())),
        "unset" => set(text(2), None),
        "write" => fs::write(&path, bytes(text(2))).unwrap(),
        "remove" if path.is_dir() => fs::remove_dir_all(&path).unwrap(),
        "remove" => fs::remove_file(&path).unwrap(),
        "rename" => fs::rename(&path, beside(text(2))).unwrap(),
        "copy" => drop(fs::copy(&path, beside(text(2))).unwrap()),
        "cut" | "append" => {
            let mut file = fs::read(&path).unwrap();
            let n = edit[2].as_i64().unwrap();
            let len = if text(0) == "append" || n < 0 { file.len() as i64 + n } else { n };
            file.resize(len as usize, 0);
            fs::write(&path, file).unwrap();
        }
        "shard" => shard(&path, edit[2].as_u64().unwrap() as usize, text(3), text(4)),
        "tokenizer" => {
            for name in ["vocab.json", "merges.txt"] {
                fs::remove_file(path.join(name)).unwrap();
            }
            write_vocabulary(&path, text(2), &edit[3]);
        }
        op => {
            let mut tensors = read_tensors(&path);
            retensor(&mut tensors, op, edit);
            write_tensors(&path, &tensors);
        }
    }
}

/// The edits of tensors.
fn retensor(tensors: &mut Tensors, op: &str, edit: &Value) {
    let text = |i: usize| edit[i].as_str().unwrap();
    match op {
        "drop" => drop(tensors.remove(text(2)).unwrap()),
        "add" => {
            let shape: Vec<usize> = serde_json::from_value(edit[3].clone()).unwrap();
            tensors.insert(text(2).to_owned(), filled(text(2), &shape));
        }
        "cast" => {
            let to: Dtype = serde_json::from_value(edit[2].clone()).unwrap();
            for (dtype, _, data) in tensors.values_mut() {
                (*dtype, *data) = (to, floats(data).into_iter().flat_map(|value| cast(value, to)).collect());
            }
        }
        "scale" => {
            let factor = edit[2].as_f64().unwrap() as f32;
            for (_, _, data) in tensors.values_mut() {
                *data = floats(data).into_iter().flat_map(|value| (value * factor).to_le_bytes()).collect();
            }
        }
        "spoil" => {
            let value: f32 = text(3).parse().unwrap();
            tensors.get_mut(text(2)).unwrap().2[..4].copy_from_slice(&value.to_le_bytes());
        }
        "retitle" => {
            let all = std::mem::take(tensors).into_iter();
            *tensors = all.map(|(name, value)| (name.replace(text(2), text(3)), value)).collect();
        }
        other => panic!("no edit {other}"),
    }
}

/// Splits a file into `n` and an index; `{i}` in the stem is the number of each.
pub(crate) fn shard(path: &Path, n: usize, stem: &str, index: &str) {
    let tensors = read_tensors(path);
    fs::remove_file(path).unwrap();
    let mut files = Map::new();
    for i in 0..n {
        let name = format!("{}.safetensors", stem.replace("{i}", &format!("{:05}-of-{n:05}", i + 1)));
        let mine: Tensors = tensors.clone().into_iter().skip(i).step_by(n).collect();
        write_tensors(&path.with_file_name(&name), &mine);
        files.extend(mine.into_keys().map(|tensor| (tensor, json!(name))));
    }
    let index_text = json!({"metadata": {"total_size": 1}, "weight_map": files}).to_string();
    fs::write(path.with_file_name(index), index_text).unwrap();
}

/// The sums of the weights of each part, once it has drawn.
fn sums(dir: &Path) -> Result<BTreeMap<&'static str, f64>> {
    let (bundle, cpu) = (Bundle::open(dir)?, Device::Cpu);
    let models = Models::load(&bundle, &cpu, Precision::F32)?;
    let prompt = "a mug <my-jar> on a beach".to_owned();
    let picture = [ImageRequest { prompt, negative: String::new(), seed: 1 }];
    let settings = SampleSettings { sampler: Sampler::Dpmpp2m, steps: 2, guidance: 1.0, width: 8, height: 8 };
    let noise = initial_noise(&picture, settings.latent_dims(&models))?;
    let drawn = latents::<()>(&models, &picture, &settings, &noise, &mut |_, _| Ok(()));
    let drawn = drawn.map_err(|interrupt| match interrupt {
        Interrupt::Failed(error) => error,
        Interrupt::Stopped(()) => panic!("nobody stopped it"),
    })?;
    let largest = drawn.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
    assert!(largest.is_finite(), "{} drew what is no number", dir.display());
    let parts = [
        ("text_encoder", bundle.text_encoder(&cpu, Precision::F32, false)?.params),
        ("unet", bundle.unet(&cpu, Precision::F32, false)?.params),
        ("vae", bundle.vae(&cpu, Precision::F32, false)?.params),
    ];
    let sum =
        |param: &hypnos::ml::param::Param| param.value().to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>();
    parts
        .into_iter()
        .map(|(part, params)| Ok((part, params.values().map(sum).sum::<candle_core::Result<f64>>()?)))
        .collect()
}

/// How ours differs from the reference in a case, if it does.
fn difference(dir: &Path, case: &Value) -> Option<String> {
    let (ours, checked) = (sums(dir), check(dir).errors);
    if ours.is_ok() != checked.is_empty() {
        return Some(format!("check says {checked:?}, loading {ours:?}"));
    }
    let wanted = case["ours"].as_bool().unwrap_or(!case["sums"].is_null());
    let ours = match ours {
        Ok(ours) if wanted => ours,
        Ok(_) => return Some("is loaded".into()),
        Err(error) if wanted => return Some(format!("is refused: {error}")),
        Err(error) if !error.is_input() => return Some(format!("is called the machine's fault: {error}")),
        Err(_) => return None,
    };
    let theirs = case["sums"].as_object()?;
    let off =
        |(part, sum): (&&str, &f64)| (theirs[*part].as_f64().unwrap() - sum).abs() > 1e-4 + 1e-5 * sum.abs();
    ours.iter().any(off).then(|| format!("has other weights: {ours:?}"))
}

#[test]
fn a_directory_is_loaded_where_diffusers_loads_it() {
    let mut cases = rows("bundles.jsonl");
    let base = base(cases.remove(0)["files"].as_object().unwrap());
    assert!(cases.len() >= 300, "{} directories", cases.len());
    let compared = &|case: &Value| {
        let dir = tempfile::tempdir().unwrap();
        crate::bundles::copy(base.path(), dir.path());
        for one in case["edits"].as_array().unwrap() {
            edit(dir.path(), one);
        }
        difference(dir.path(), case).map(|what| format!("{case}\n  ours {what}"))
    };
    let n_threads = thread::available_parallelism().map_or(1, NonZero::get);
    let wrong: Vec<String> = thread::scope(|scope| {
        let parts: Vec<_> = cases
            .chunks(cases.len().div_ceil(n_threads))
            .map(|part| scope.spawn(move || part.iter().filter_map(compared).collect::<Vec<_>>()))
            .collect();
        parts.into_iter().flat_map(|part| part.join().unwrap()).collect()
    });
    agreed("directories", cases.len(), &wrong);
}

#[test]
fn what_a_file_is_instead_of_weights_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let path: PathBuf = dir.path().join("x.safetensors");
    let tar = [vec![b'x'; 257], b"ustar".to_vec(), vec![0; 300]].concat();
    for (file, wanted) in [
        (&b"PK\x03\x04\0\0\0\0\0\0\0\0"[..], "is a zip archive, most likely a PyTorch pickle"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "is a Python pickle"),
        (b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0", "is a GGUF file"),
        (&tar, "is a tar archive"),
        (
            b"{\"error\": \"Repository not found\"}",
            "is text that begins with `{\"error\": \"Repository not found\"}`",
        ),
        (
            b"Access to model x/y is restricted",
            "is text that begins with `Access to model x/y is restricted`",
        ),
        (&[0; 4096], "begins with zeros, as a download does that was broken off"),
        (b"", "has 0 bytes; a safetensors file has at least 8"),
        (b"{}", "has 2 bytes; a safetensors file has at least 8"),
    ] {
        fs::write(&path, file).unwrap();
        let said = TensorFile::open(&path).unwrap_err().to_string();
        assert!(said.contains(wanted), "{said}");
    }
}
