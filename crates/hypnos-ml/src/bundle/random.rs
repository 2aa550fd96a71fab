//! Bundles of seeded random weights, for tests and benchmarks: they load, sample and train like any other, and draw
//! noise.
//!
//! The tokenizer is synthetic, with as many entries as the real one.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::{DType, Device};
use serde_json::json;

use super::configs::{PARTS, read_config};
use super::families::{Like, Sizes};
use super::files::{SMALL_FILES, hash_file, odd, vacant, weight_file, write_json, write_text};
use super::manifest::{Drawing, Manifest, Origin};
use crate::Result;
use crate::models::clip::{self, ClipText};
use crate::models::unet::{self, Unet};
use crate::models::vae::{self, Vae};
use crate::random::derive;
use crate::tensorfile::{save_streaming, torch_metadata};
use crate::weights::{Weights, meta_params};

/// Words that every random bundle has as single tokens.
const RARE_TOKENS: [&str; 6] = ["sks", "zwx", "ohwx", "xjy", "qvk", "olis"];

/// Writes a bundle of random weights into `out`, which must be empty or not be there yet.
///
/// The bytes depend on `like`, `seed` and `dtype` (f32, f16 or bf16) only; [`Weights::random`] says how values are
/// drawn. One tensor is in memory at a time. `progress` is told how many of how many weights are written.
/// `hypnos.json` comes last: a bundle that was cut off has none. [`Error::File`](crate::Error::File) if `out` cannot be
/// written.
pub fn random(
    like: Like,
    seed: u64,
    dtype: DType,
    out: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    vacant(out)?;
    let sizes = like.sizes();
    for (path, config) in sizes.configs() {
        write_json(&out.join(path), &config)?;
    }
    write_tokenizer(&out.join("tokenizer"), sizes.vocab_size, sizes.pad())?;
    write_weights(out, seed, dtype, progress)?;
    write_json(
        &out.join("hypnos.json"),
        &serde_json::to_value(manifest(&sizes, seed, out)?).map_err(|e| odd(&e))?,
    )
}

/// Every tensor of every part, straight to its file.
fn write_weights(out: &Path, seed: u64, dtype: DType, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
    let wanted = [
        meta_params(|w| ClipText::load(w, &read_config(out, "text_encoder", clip::Config::check)?))?,
        meta_params(|w| Unet::load(w, &read_config(out, "unet", unet::Config::check)?))?,
        meta_params(|w| Vae::load(w, &read_config(out, "vae", vae::Config::check)?))?,
    ];
    let n_total = wanted.iter().flat_map(BTreeMap::values).map(|p| p.value().elem_count() as u64).sum();
    let mut n_done = 0;
    for ((part, _), params) in PARTS.into_iter().zip(wanted) {
        let shapes: BTreeMap<String, Vec<usize>> =
            params.iter().map(|(name, p)| (name.clone(), p.value().dims().to_vec())).collect();
        save_streaming(&out.join(part).join(weight_file(part)), &shapes, &torch_metadata(), dtype, |name| {
            // A source remembers what it gave, so each tensor gets its own.
            let tensor = Weights::random(derive(seed, part), &Device::Cpu).get(name, &shapes[name])?.value();
            n_done += tensor.elem_count() as u64;
            progress(n_done, n_total);
            Ok(tensor)
        })?;
    }
    Ok(())
}

fn manifest(sizes: &Sizes, seed: u64, out: &Path) -> Result<Manifest> {
    let weights = PARTS.map(|(part, _)| format!("{part}/{}", weight_file(part)));
    let mut files = BTreeMap::new();
    let small = SMALL_FILES.map(str::to_owned).into_iter().filter(|path| out.join(path).exists());
    for path in small.chain(weights) {
        let origin = Origin {
            source: "random weights written by hypnos".into(),
            revision: format!("seed {seed}"),
            sha256: hash_file(&out.join(&path))?,
            licence: "MIT OR Apache-2.0".into(),
            converted_from: Vec::new(),
        };
        files.insert(path, origin);
    }
    Ok(Manifest {
        name: format!("random {} {seed}", sizes.kind),
        kind: sizes.kind.into(),
        resolution: Some(sizes.resolution()),
        rare_tokens: RARE_TOKENS.map(str::to_owned).to_vec(),
        training: BTreeMap::new(),
        drawing: Drawing::default(),
        classes: None,
        product: None,
        files,
        accepted_licences: BTreeSet::new(),
    })
}

/// A tokenizer of CLIP's form: the symbols of the 256 bytes, the same at the end of a word, what merges make of them,
/// start and end. Texts are filled up with `pad`.
fn write_tokenizer(dir: &Path, vocab_size: usize, pad: &str) -> Result<()> {
    let symbols: Vec<String> = byte_symbols().into_iter().map(String::from).collect();
    let merges = synthetic_merges(vocab_size - 2 * symbols.len() - 2);
    let vocab = symbols.iter().cloned();
    let vocab = vocab.chain(symbols.iter().map(|s| format!("{s}</w>")));
    let vocab = vocab.chain(merges.iter().map(|(a, b)| format!("{a}{b}")));
    let vocab = vocab.chain(["<|startoftext|>", "<|endoftext|>"].map(str::to_owned));
    let lines: Vec<String> = vocab.enumerate().map(|(i, token)| format!("{}:{i}", json!(token))).collect();
    write_text(&dir.join("vocab.json"), &format!("{{{}}}\n", lines.join(",\n")))?;
    let lines: Vec<String> = merges.iter().map(|(a, b)| format!("{a} {b}")).collect();
    write_text(&dir.join("merges.txt"), &format!("#version: 0.2\n{}\n", lines.join("\n")))?;
    let special = json!({
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": pad,
        "unk_token": "<|endoftext|>",
    });
    write_json(&dir.join("special_tokens_map.json"), &special)?;
    let config = json!({"do_lower_case": true, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"});
    write_json(&dir.join("tokenizer_config.json"), &config)
}

/// One visible character for each byte, in the order of GPT-2's `bytes_to_unicode`: those that are visible in
/// Latin-1 stand for themselves, the others follow from U+0100 on.
fn byte_symbols() -> Vec<char> {
    let visible = (0x21..=0x7e).chain(0xa1..=0xac).chain(0xae..=0xff_u8).map(char::from);
    let n_hidden = 256 - visible.clone().count() as u32;
    visible.chain((0..n_hidden).filter_map(|i| char::from_u32(0x100 + i))).collect()
}

/// `n` merges: those that make the rare tokens first, then all letters in twos, threes and fours, within a word and
/// at its end.
fn synthetic_merges(n: usize) -> Vec<(String, String)> {
    let rare = RARE_TOKENS.into_iter().flat_map(|word| {
        (1..word.len()).map(move |end| {
            let last = if end + 1 == word.len() { "</w>" } else { "" };
            (word[..end].to_owned(), format!("{}{last}", &word[end..=end]))
        })
    });
    let kinds = (1..=3).flat_map(|length| ["", "</w>"].map(|end| (length, end)));
    let others = kinds.flat_map(|(length, end)| {
        let stems = (0..26_usize.pow(length)).map(move |i| letters(i, length));
        stems.flat_map(move |stem| ('a'..='z').map(move |letter| (stem.clone(), format!("{letter}{end}"))))
    });
    let mut made = BTreeSet::new();
    rare.chain(others).filter(|(a, b)| made.insert(format!("{a}{b}"))).take(n).collect()
}

/// The `i`-th word of so many letters, in the order of the dictionary.
fn letters(i: usize, length: u32) -> String {
    (0..length).rev().map(|place| char::from(b'a' + (i / 26_usize.pow(place) % 26) as u8)).collect()
}
