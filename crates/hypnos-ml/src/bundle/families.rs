//! The builds of models that are known by their sizes, and the configs that describe them as diffusers does.
//!
//! The sizes of Stable Diffusion 1.5, 2 and 2.1 are public facts (Rombach et al. 2022, arXiv 2112.10752, and the
//! configs of their files).

use serde_json::{Value, json};

use super::configs::model_index;
use crate::diffusion::Prediction;

/// Whose sizes a bundle has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Like {
    /// Stable Diffusion 1.5: 512 pixels, 1066 million weights.
    Sd15,
    /// Stable Diffusion 2.1 for 768 pixels, which predicts v: 1290 million weights.
    Sd2,
    /// The bundle of the tests, `tests/bundle`: 64 pixels, 6.6 million weights.
    Miniature,
}

/// The numbers in which they differ.
#[derive(Clone, Debug)]
pub(crate) struct Sizes {
    pub(crate) kind: &'static str,
    unet_channels: &'static [usize],
    unet_layers: usize,
    /// Of every level.
    unet_heads: &'static [usize],
    /// Whether a transformer's projections are matrices; convolutions of one pixel otherwise.
    linear: bool,
    /// Side of the latents.
    pub(crate) unet_side: usize,
    vae_channels: &'static [usize],
    vae_layers: usize,
    vae_groups: usize,
    pub(crate) scaling_factor: f64,
    text_width: usize,
    text_layers: usize,
    text_heads: usize,
    /// OpenCLIP's text encoder has the exact gelu, OpenAI's its quick form.
    text_activation: &'static str,
    pub(crate) vocab_size: usize,
    scheduler: &'static str,
    pub(crate) prediction: Prediction,
}

impl Like {
    pub(crate) fn sizes(self) -> Sizes {
        match self {
            Like::Sd15 => Sizes {
                kind: "sd15",
                unet_channels: &[320, 640, 1280, 1280],
                unet_layers: 2,
                unet_heads: &[8; 4],
                linear: false,
                unet_side: 64,
                vae_channels: &[128, 256, 512, 512],
                vae_layers: 2,
                vae_groups: 32,
                scaling_factor: 0.18215,
                text_width: 768,
                text_layers: 12,
                text_heads: 12,
                text_activation: "quick_gelu",
                vocab_size: 49408,
                scheduler: "PNDMScheduler",
                prediction: Prediction::Epsilon,
            },
            Like::Sd2 => Sizes {
                kind: "sd2",
                unet_heads: &[5, 10, 20, 20],
                linear: true,
                unet_side: 96,
                text_width: 1024,
                text_layers: 23, // of 24: what comes before the last is read
                text_heads: 16,
                text_activation: "gelu",
                scheduler: "DDIMScheduler",
                prediction: Prediction::V,
                ..Like::Sd15.sizes()
            },
            Like::Miniature => Sizes {
                kind: "miniature",
                unet_channels: &[64, 96, 128],
                unet_layers: 1,
                unet_heads: &[2; 3],
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
                ..Like::Sd15.sizes()
            },
        }
    }
}

impl Sizes {
    /// Side of the pictures, in pixels.
    pub(crate) fn resolution(&self) -> usize {
        self.unet_side << (self.vae_channels.len() - 1)
    }

    /// What texts are filled up with. OpenCLIP's models were trained with zeros, which stand for `!`.
    pub(crate) fn pad(&self) -> &'static str {
        if self.text_activation == "gelu" { "!" } else { "<|endoftext|>" }
    }

    /// Every JSON file but the tokenizer's and `hypnos.json`, by its path.
    pub(crate) fn configs(&self) -> [(&'static str, Value); 5] {
        [
            ("model_index.json", model_index(self.scheduler)),
            ("scheduler/scheduler_config.json", self.scheduler_config()),
            ("text_encoder/config.json", self.text_config()),
            ("unet/config.json", self.unet_config()),
            ("vae/config.json", self.vae_config()),
        ]
    }

    fn scheduler_config(&self) -> Value {
        let mut config = json!({
            "_class_name": self.scheduler,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "clip_sample": false,
            "num_train_timesteps": 1000,
            "prediction_type": self.prediction.word(),
            "set_alpha_to_one": false,
            "steps_offset": 1,
            "timestep_spacing": "leading",
            "trained_betas": null,
        });
        if self.scheduler == "PNDMScheduler" {
            config["skip_prk_steps"] = true.into();
        }
        config
    }

    fn text_config(&self) -> Value {
        json!({
            "architectures": ["CLIPTextModel"],
            "bos_token_id": self.vocab_size - 2,
            "eos_token_id": self.vocab_size - 1,
            "hidden_act": self.text_activation,
            "hidden_size": self.text_width,
            "intermediate_size": 4 * self.text_width,
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": 77,
            "model_type": "clip_text_model",
            "num_attention_heads": self.text_heads,
            "num_hidden_layers": self.text_layers,
            "pad_token_id": if self.pad() == "!" { 0 } else { self.vocab_size - 1 },
            "projection_dim": self.text_width,
            "vocab_size": self.vocab_size,
        })
    }

    fn unet_config(&self) -> Value {
        let attending = self.unet_channels.len() - 1; // all levels but the deepest
        let mut down = vec!["CrossAttnDownBlock2D"; attending];
        down.push("DownBlock2D");
        let mut up = vec!["UpBlock2D"];
        up.resize(attending + 1, "CrossAttnUpBlock2D");
        let heads = self.unet_heads;
        let mut config = json!({
            "_class_name": "UNet2DConditionModel",
            "act_fn": "silu",
            "attention_head_dim": if heads.iter().all(|n| *n == heads[0]) { json!(heads[0]) } else { json!(heads) },
            "block_out_channels": self.unet_channels,
            "center_input_sample": false,
            "cross_attention_dim": self.text_width,
            "down_block_types": down,
            "downsample_padding": 1,
            "flip_sin_to_cos": true,
            "freq_shift": 0,
            "in_channels": 4,
            "layers_per_block": self.unet_layers,
            "mid_block_scale_factor": 1,
            "norm_eps": 1e-5,
            "norm_num_groups": 32,
            "out_channels": 4,
            "sample_size": self.unet_side,
            "up_block_types": up,
        });
        if self.linear {
            config["use_linear_projection"] = true.into();
            config["upcast_attention"] = true.into(); // f16 is too narrow for the scores of 2.1
        }
        config
    }

    fn vae_config(&self) -> Value {
        let n_levels = self.vae_channels.len();
        json!({
            "_class_name": "AutoencoderKL",
            "act_fn": "silu",
            "block_out_channels": self.vae_channels,
            "down_block_types": vec!["DownEncoderBlock2D"; n_levels],
            "in_channels": 3,
            "latent_channels": 4,
            "layers_per_block": self.vae_layers,
            "norm_num_groups": self.vae_groups,
            "out_channels": 3,
            "sample_size": self.resolution(),
            "scaling_factor": self.scaling_factor,
            "up_block_types": vec!["UpDecoderBlock2D"; n_levels],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the goldens of names were made for: configs that diffusers and transformers build the published models of.
    fn published(name: &str) -> Value {
        let path = format!("{}/../../tests/golden/ldm_names/{name}.jsonl", env!("CARGO_MANIFEST_DIR"));
        let text = std::fs::read_to_string(path).unwrap();
        serde_json::from_str(text.lines().next().unwrap()).unwrap()
    }

    #[test]
    fn the_known_builds_are_those_of_the_published_models() {
        let unet = [
            "attention_head_dim",
            "block_out_channels",
            "cross_attention_dim",
            "down_block_types",
            "layers_per_block",
            "norm_num_groups",
            "sample_size",
            "up_block_types",
        ];
        let vae = [
            "block_out_channels",
            "latent_channels",
            "layers_per_block",
            "norm_num_groups",
            "scaling_factor",
        ];
        let text =
            ["hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"];
        for (like, name) in [(Like::Sd15, "sd15"), (Like::Sd2, "sd2")] {
            let published = published(name);
            for (path, own) in like.sizes().configs() {
                let part = path.split('/').next().unwrap();
                let keys = match part {
                    "unet" => &unet[..],
                    "vae" => &vae,
                    "text_encoder" => &text,
                    _ => continue,
                };
                for key in keys {
                    assert_eq!(own[key], published[part][key], "{name}: {path}: {key}");
                }
                let flag = |config: &Value| config["use_linear_projection"].as_bool().unwrap_or(false);
                assert_eq!(flag(&own), part == "unet" && flag(&published["unet"]), "{name}: {path}");
            }
        }
    }
}
