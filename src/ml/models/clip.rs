//! CLIP's text encoder (Radford et al. 2021, arXiv 2103.00020): token ids to the hidden states that condition the UNet.
//!
//! Ports transformers' `CLIPTextModel`. No pooled output and no projection: Stable Diffusion 1.x uses neither.

use candle_core::{Result, Tensor};
use serde::Deserialize;

use super::refuse;
use crate::ml::nn::{LayerNorm, Linear};
use crate::ml::ops::{self, Activation};
use crate::ml::param::Param;
use crate::ml::weights::Weights;

/// `text_encoder/config.json`.
#[derive(Clone, Debug, Deserialize)]
pub struct Config {
    /// Rows of the token embedding.
    pub vocab_size: usize,
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Width inside each feed-forward.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Heads of each attention.
    pub num_attention_heads: usize,
    /// Longest sequence.
    #[serde(default = "positions")]
    pub max_position_embeddings: usize,
    /// Activation of each feed-forward.
    #[serde(default = "quick_gelu")]
    pub hidden_act: Activation,
    /// Eps of each norm.
    #[serde(default = "eps")]
    pub layer_norm_eps: f64,
}

fn positions() -> usize {
    77
}

fn quick_gelu() -> Activation {
    Activation::QuickGelu
}

fn eps() -> f64 {
    1e-5
}

impl Config {
    /// Refuses sizes that cannot be a model.
    pub fn check(&self) -> crate::ml::Result<()> {
        let positive =
            [self.vocab_size, self.hidden_size, self.intermediate_size, self.max_position_embeddings];
        refuse(!positive.contains(&0), "a size", 0, "every size above zero")?;
        let heads = self.num_attention_heads;
        refuse(
            heads > 0 && self.hidden_size.is_multiple_of(heads),
            "num_attention_heads",
            heads,
            "a divisor of hidden_size",
        )
    }
}

/// The text encoder. Cloning shares the weights.
#[derive(Clone, Debug)]
pub struct ClipText {
    token_embedding: Param,
    /// Embeddings that stand in the place of rows of the table: which row, and `[1, D]`.
    learned: Vec<(u32, Param)>,
    position_embedding: Param,
    layers: Vec<Layer>,
    final_layer_norm: LayerNorm,
    n_positions: usize,
}

#[derive(Clone, Debug)]
struct Layer {
    layer_norm1: LayerNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    layer_norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    n_heads: usize,
    activation: Activation,
}

impl ClipText {
    /// From weights named as transformers names them, with or without the leading `text_model.`.
    pub fn load(w: &Weights, config: &Config) -> crate::ml::Result<Self> {
        config.check()?;
        let (w, d) = (w.pp("text_model"), config.hidden_size);
        let embeddings = w.pp("embeddings");
        let layers = w.pp("encoder").pp("layers");
        Ok(Self {
            token_embedding: embeddings.pp("token_embedding").get("weight", &[config.vocab_size, d])?,
            learned: Vec::new(),
            position_embedding: embeddings
                .pp("position_embedding")
                .get("weight", &[config.max_position_embeddings, d])?,
            layers: (0..config.num_hidden_layers)
                .map(|i| Layer::load(&layers.pp(i), config))
                .collect::<crate::ml::Result<_>>()?,
            final_layer_norm: LayerNorm::load(&w.pp("final_layer_norm"), d, config.layer_norm_eps)?,
            n_positions: config.max_position_embeddings,
        })
    }

    /// Token ids, one sequence of equal length per prompt, to the last hidden states `[B, L, D]` after the final norm.
    pub fn forward(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        let (b, l) = (ids.len(), ids.first().map_or(0, Vec::len));
        if b == 0 || l == 0 || l > self.n_positions || ids.iter().any(|ids| ids.len() != l) {
            candle_core::bail!("clip: wanted sequences of one length up to {}, got {l}", self.n_positions);
        }
        let places: Vec<u32> = (0..b).flat_map(|_| 0..l as u32).collect();
        let tokens = self.tokens(&ids.concat(), &[b, l])?;
        let mut x = (tokens + ops::embedding(&places, &[b, l], &self.position_embedding)?)?; // [B, L, D]
        for layer in &self.layers {
            x = layer.forward(&x)?;
        }
        self.final_layer_norm.forward(&x)
    }

    /// Width of the hidden states.
    pub fn width(&self) -> usize {
        self.position_embedding.dims()[1]
    }

    /// The same with `row` `[1, D]` in the place of the embedding of `id` (Gal et al. 2022, arXiv 2208.01618).
    pub fn with_embedding(&self, id: u32, row: Param) -> Result<Self> {
        let (wanted, n_rows) = ([1, self.width()], self.token_embedding.dims()[0]);
        if row.dims() != wanted || id as usize >= n_rows {
            candle_core::bail!(
                "{}: wanted {wanted:?} for one of {n_rows} tokens, got {:?} for {id}",
                row.name(),
                row.dims()
            );
        }
        let mut with = self.clone();
        with.learned.retain(|(other, _)| *other != id);
        with.learned.push((id, row));
        Ok(with)
    }

    /// Mean of the embeddings of `ids`, `[1, D]`.
    pub fn mean_embedding(&self, ids: &[u32]) -> Result<Tensor> {
        self.tokens(ids, &[ids.len()])?.detach().mean_keepdim(0)
    }

    /// `[dims.., D]`
    fn tokens(&self, ids: &[u32], dims: &[usize]) -> Result<Tensor> {
        let mut tokens = ops::embedding(ids, dims, &self.token_embedding)?;
        for (id, row) in &self.learned {
            // 1 where the token stands, 0 elsewhere: exact either way.
            let here: Vec<f32> = ids.iter().map(|other| f32::from(other == id)).collect();
            let here = Tensor::from_vec(here, dims, tokens.device())?.unsqueeze(dims.len())?;
            let learned = ops::embedding(&vec![0; ids.len()], dims, row)?;
            tokens = (tokens.broadcast_mul(&(1.0 - &here)?)? + learned.broadcast_mul(&here)?)?;
        }
        Ok(tokens)
    }
}

impl Layer {
    fn load(w: &Weights, config: &Config) -> crate::ml::Result<Self> {
        let (d, inner, eps) = (config.hidden_size, config.intermediate_size, config.layer_norm_eps);
        let (attention, mlp) = (w.pp("self_attn"), w.pp("mlp"));
        Ok(Self {
            layer_norm1: LayerNorm::load(&w.pp("layer_norm1"), d, eps)?,
            q_proj: Linear::load(&attention.pp("q_proj"), d, d)?,
            k_proj: Linear::load(&attention.pp("k_proj"), d, d)?,
            v_proj: Linear::load(&attention.pp("v_proj"), d, d)?,
            out_proj: Linear::load(&attention.pp("out_proj"), d, d)?,
            layer_norm2: LayerNorm::load(&w.pp("layer_norm2"), d, eps)?,
            fc1: Linear::load(&mlp.pp("fc1"), d, inner)?,
            fc2: Linear::load(&mlp.pp("fc2"), inner, d)?,
            n_heads: config.num_attention_heads,
            activation: config.hidden_act,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let hidden = self.layer_norm1.forward(x)?;
        let (q, k, v) =
            (self.q_proj.forward(&hidden)?, self.k_proj.forward(&hidden)?, self.v_proj.forward(&hidden)?);
        let x = (x + self.out_proj.forward(&ops::attention(&q, &k, &v, self.n_heads, true)?)?)?;
        let hidden = self.fc1.forward(&self.layer_norm2.forward(&x)?)?;
        x + self.fc2.forward(&ops::activate(&hidden, self.activation)?)?
    }
}
