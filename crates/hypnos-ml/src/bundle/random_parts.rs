//! The networks that a bundle learns with and is judged by, with seeded random weights: their numbers mean nothing.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device};
use serde_json::{Value, json};

use super::convert::part_shapes;
use super::files::write_json;
use crate::Result;
use crate::random::derive;
use crate::tensorfile::save_streaming;
use crate::tokenizer::Tokenizer;
use crate::weights::Weights;

/// The biases of the norms before the features.
const LAST_NORMS: [&str; 3] =
    ["norm.bias", "vision_model.post_layernorm.bias", "text_model.final_layer_norm.bias"];

/// Writes `metrics/{dino,clip,inception,lpips}` of small sizes into the bundle in `dir`, which has a tokenizer. The
/// bytes depend on the vocabulary's size and `seed` only. [`crate::Error::File`] if they cannot be written.
pub fn random_metrics(dir: &Path, seed: u64) -> Result<()> {
    let n_tokens = Tokenizer::open(&dir.join("tokenizer"))?.vocab_size();
    for (part, config) in small(n_tokens) {
        random_part(dir, part, &config, seed)?;
    }
    Ok(())
}

/// Writes `config.json` and `model.safetensors` of a part, one of [`super::Capability::parts`], into the bundle in `dir`,
/// with the sizes of this config. The bytes depend on the config and `seed` only. [`crate::Error::File`] if they cannot be
/// written.
pub fn random_part(dir: &Path, part: &str, config: &Value, seed: u64) -> Result<()> {
    write_json(&dir.join(part).join("config.json"), config)?;
    let shapes = part_shapes(dir, part)?;
    let file = dir.join(part).join("model.safetensors");
    save_streaming(&file, &shapes, &BTreeMap::new(), DType::F32, |name| {
        let tensor = Weights::random(derive(seed, part), &Device::Cpu).get(name, &shapes[name])?.value();
        Ok(match name {
            // A distance's heads add up: none may take away.
            name if name.starts_with("lin") => tensor.abs()?,
            // Pictures have more in common than not, as they have to real networks.
            name if LAST_NORMS.contains(&name) => (tensor + 2.0)?,
            _ => tensor,
        })
    })
}

fn small(n_tokens: usize) -> [(&'static str, Value); 4] {
    let small = json!({
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "image_size": 32, "patch_size": 8,
    });
    let mut text = small.clone();
    text["vocab_size"] = json!(n_tokens);
    let mut dino = small.clone();
    dino["resize"] = json!(36);
    [
        ("metrics/dino", dino),
        ("metrics/clip", json!({"text_config": text, "vision_config": small, "projection_dim": 16})),
        ("metrics/inception", json!({"image_size": 75, "channel_divisor": 16})),
        ("metrics/lpips", json!({"net": "alex", "channel_divisor": 16})),
    ]
}
