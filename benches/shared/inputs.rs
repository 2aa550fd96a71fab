//! What both sides of a case are given: Stable Diffusion 1.5's configurations, and seeded numbers.

use candle_core::{Device, Tensor};
use hypnos::ml::{Error, Result, random};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// All weights and inputs are drawn from it.
pub(crate) const SEED: u64 = 15;

/// The text encoder of Stable Diffusion 1.5, CLIP ViT-L/14's.
pub(crate) const TEXT: &str = r#"{
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5
}"#;

/// The UNet of Stable Diffusion 1.5.
pub(crate) const UNET: &str = r#"{
    "in_channels": 4, "out_channels": 4, "sample_size": 64, "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2, "attention_head_dim": 8, "cross_attention_dim": 768, "norm_num_groups": 32,
    "norm_eps": 1e-5, "act_fn": "silu", "flip_sin_to_cos": true, "freq_shift": 0,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]
}"#;

/// The autoencoder of Stable Diffusion 1.5.
pub(crate) const VAE: &str = r#"{
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "sample_size": 512,
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32, "act_fn": "silu",
    "scaling_factor": 0.18215,
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"]
}"#;

/// One of the texts above.
pub(crate) fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_default()
}

/// A model's configuration.
pub(crate) fn config<T: DeserializeOwned>(json: &Value) -> Result<T> {
    serde_json::from_value(json.clone()).map_err(|error| Error::input(format!("config: {error}")))
}

/// Normal numbers of the given standard deviation, f32.
pub(crate) fn normal(label: &str, dims: &[usize], std: f32, device: &Device) -> candle_core::Result<Tensor> {
    let values = random::normal(random::derive(SEED, label), 0, dims.iter().product());
    Tensor::from_vec(values.into_iter().map(|v| v * std).collect::<Vec<_>>(), dims, device)
}

/// Uniform numbers of rows.
pub(crate) fn token_ids(n: usize, n_rows: usize) -> Vec<u32> {
    let seed = random::derive(SEED, "ids");
    (0..n as u64).map(|i| random::below(seed, 0, i, n_rows) as u32).collect()
}
