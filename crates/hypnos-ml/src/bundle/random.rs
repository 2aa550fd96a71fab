//! Bundles of seeded random weights, for tests and benchmarks: they load, sample and train like any other, and draw
//! noise.
//!
//! The sizes of SD 1.5 are public facts (Rombach et al. 2022, arXiv 2112.10752, and the configs of its files); the
//! tokenizer is synthetic, with as many entries as the real one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use candle_core::{DType, Device};
use serde_json::{Value, json};

use super::configs::{PARTS, model_index, read_config};
use super::files::{SMALL_FILES, bad, hash_file, odd, weight_file, write_json, write_text};
use super::manifest::{Drawing, Manifest, Origin};
use crate::Result;
use crate::models::clip::{self, ClipText};
use crate::models::unet::{self, Unet};
use crate::models::vae::{self, Vae};
use crate::random::derive;
use crate::tensorfile::save_streaming;
use crate::weights::{Weights, meta_params};

/// Words that every random bundle has as single tokens.
const RARE_TOKENS: [&str; 6] = ["sks", "zwx", "ohwx", "xjy", "qvk", "olis"];

/// Whose sizes a random bundle has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Like {
    /// Stable Diffusion 1.5: 512 pixels, 1066 million weights.
    Sd15,
    /// The bundle of the tests, `tests/bundle`: 64 pixels, 6.6 million weights.
    Miniature,
}

/// The numbers in which the two differ.
struct Sizes {
    kind: &'static str,
    unet_channels: &'static [usize],
    unet_layers: usize,
    unet_heads: usize,
    unet_side: usize,
    vae_channels: &'static [usize],
    vae_layers: usize,
    vae_groups: usize,
    scaling_factor: f64,
    text_width: usize,
    text_layers: usize,
    text_heads: usize,
    vocab_size: usize,
    scheduler: &'static str,
}

impl Like {
    fn sizes(self) -> Sizes {
        match self {
            Like::Sd15 => Sizes {
                kind: "sd15",
                unet_channels: &[320, 640, 1280, 1280],
                unet_layers: 2,
                unet_heads: 8,
                unet_side: 64,
                vae_channels: &[128, 256, 512, 512],
                vae_layers: 2,
                vae_groups: 32,
                scaling_factor: 0.18215,
                text_width: 768,
                text_layers: 12,
                text_heads: 12,
                vocab_size: 49408,
                scheduler: "PNDMScheduler",
            },
            Like::Miniature => Sizes {
                kind: "miniature",
                unet_channels: &[64, 96, 128],
                unet_layers: 1,
                unet_heads: 2,
                unet_side: 16,
                vae_channels: &[32, 48, 64],
                vae_layers: 1,
                vae_groups: 8,
                scaling_factor: 0.429_625_455_009_931_16,
                text_width: 128,
                text_layers: 4,
                text_heads: 4,
                vocab_size: 902,
                scheduler: "DDIMScheduler",
            },
        }
    }
}

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
    if fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(bad(out, "is not empty; a new directory is wanted"));
    }
    let sizes = like.sizes();
    for (path, config) in configs(&sizes) {
        write_json(&out.join(path), &config)?;
    }
    write_tokenizer(&out.join("tokenizer"), sizes.vocab_size)?;
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
    let text = BTreeMap::from([("format".to_owned(), "pt".to_owned())]); // diffusers refuses files without it
    for ((part, _), params) in PARTS.into_iter().zip(wanted) {
        let shapes: BTreeMap<String, Vec<usize>> =
            params.iter().map(|(name, p)| (name.clone(), p.value().dims().to_vec())).collect();
        save_streaming(&out.join(part).join(weight_file(part)), &shapes, &text, dtype, |name| {
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
    for path in SMALL_FILES.map(str::to_owned).into_iter().chain(weights) {
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
        resolution: Some(sizes.unet_side << (sizes.vae_channels.len() - 1)),
        rare_tokens: RARE_TOKENS.map(str::to_owned).to_vec(),
        training: BTreeMap::new(),
        drawing: Drawing::default(),
        classes: None,
        product: None,
        files,
        accepted_licences: BTreeSet::new(),
    })
}

/// Every JSON file but the tokenizer's and `hypnos.json`.
fn configs(s: &Sizes) -> [(&'static str, Value); 5] {
    [
        ("model_index.json", model_index(s.scheduler)),
        ("scheduler/scheduler_config.json", scheduler(s)),
        ("text_encoder/config.json", text_encoder(s)),
        ("unet/config.json", unet_config(s)),
        ("vae/config.json", vae_config(s)),
    ]
}

fn scheduler(s: &Sizes) -> Value {
    let mut config = json!({
        "_class_name": s.scheduler,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": false,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "set_alpha_to_one": false,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "trained_betas": null,
    });
    if s.scheduler == "PNDMScheduler" {
        config["skip_prk_steps"] = true.into();
    }
    config
}

fn text_encoder(s: &Sizes) -> Value {
    json!({
        "architectures": ["CLIPTextModel"],
        "bos_token_id": s.vocab_size - 2,
        "eos_token_id": s.vocab_size - 1,
        "hidden_act": "quick_gelu",
        "hidden_size": s.text_width,
        "intermediate_size": 4 * s.text_width,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": s.text_heads,
        "num_hidden_layers": s.text_layers,
        "pad_token_id": s.vocab_size - 1,
        "projection_dim": s.text_width,
        "vocab_size": s.vocab_size,
    })
}

fn unet_config(s: &Sizes) -> Value {
    let attending = s.unet_channels.len() - 1; // all levels but the deepest
    let mut down = vec!["CrossAttnDownBlock2D"; attending];
    down.push("DownBlock2D");
    let mut up = vec!["UpBlock2D"];
    up.resize(attending + 1, "CrossAttnUpBlock2D");
    json!({
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": s.unet_heads,
        "block_out_channels": s.unet_channels,
        "center_input_sample": false,
        "cross_attention_dim": s.text_width,
        "down_block_types": down,
        "downsample_padding": 1,
        "flip_sin_to_cos": true,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": s.unet_layers,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": s.unet_side,
        "up_block_types": up,
    })
}

fn vae_config(s: &Sizes) -> Value {
    let n_levels = s.vae_channels.len();
    json!({
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": s.vae_channels,
        "down_block_types": vec!["DownEncoderBlock2D"; n_levels],
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": s.vae_layers,
        "norm_num_groups": s.vae_groups,
        "out_channels": 3,
        "sample_size": s.unet_side << (n_levels - 1),
        "scaling_factor": s.scaling_factor,
        "up_block_types": vec!["UpDecoderBlock2D"; n_levels],
    })
}

/// A tokenizer of CLIP's form: the symbols of the 256 bytes, the same at the end of a word, what merges make of them,
/// start and end.
fn write_tokenizer(dir: &Path, vocab_size: usize) -> Result<()> {
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
        "pad_token": "<|endoftext|>",
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
