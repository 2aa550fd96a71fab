//! CLIP (Radford et al. 2021, arXiv 2103.00020): its text encoder, whose hidden states condition the UNet, and the
//! whole model, which embeds pictures and texts into one space.
//!
//! Ports transformers' `CLIPTextModel` and `CLIPModel`.

use candle_core::{Result, Tensor};
use serde::Deserialize;

use super::refuse;
use crate::nn::{Conv2d, LayerNorm, Linear, to_tokens};
use crate::ops::{self, Activation, Conv2dSpec};
use crate::param::Param;
use crate::precision::Precision;
use crate::weights::Weights;

mod dry;

/// `text_encoder/config.json`. What it leaves out is as in the reference's class.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Rows of the token embedding.
    pub vocab_size: usize,
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Width inside each feed-forward.
    pub(crate) intermediate_size: usize,
    /// Layers.
    pub(crate) num_hidden_layers: usize,
    /// Heads of each attention.
    pub(crate) num_attention_heads: usize,
    /// Longest sequence.
    pub(crate) max_position_embeddings: usize,
    /// Activation of each feed-forward.
    pub(crate) hidden_act: Activation,
    /// Eps of each norm.
    pub(crate) layer_norm_eps: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 49408,
            hidden_size: 512,
            intermediate_size: 2048,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 77,
            hidden_act: Activation::QuickGelu,
            layer_norm_eps: 1e-5,
        }
    }
}

impl Config {
    /// Refuses sizes that cannot be a model.
    pub(crate) fn check(&self) -> crate::Result<()> {
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

/// What runs through the layers stays f32; inside of a layer it is rounded behind the norms.
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
    precision: Precision,
}

impl ClipText {
    /// From weights named as transformers names them, with or without the leading `text_model.`. It computes in what they
    /// are for.
    pub fn load(w: &Weights, config: &Config) -> crate::Result<Self> {
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
                .map(|i| Layer::load(&layers.pp(i), &Sizes::of_text(config)))
                .collect::<crate::Result<_>>()?,
            final_layer_norm: LayerNorm::load(&w.pp("final_layer_norm"), d, config.layer_norm_eps)?,
            n_positions: config.max_position_embeddings,
        })
    }

    /// Token ids, one sequence of equal length per prompt, to the last hidden states `[B, L, D]` after the final norm, in
    /// f32.
    pub fn forward(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        let (b, l) = (ids.len(), ids.first().map_or(0, Vec::len));
        if b == 0 || l == 0 || l > self.n_positions || ids.iter().any(|ids| ids.len() != l) {
            candle_core::bail!("clip: wanted sequences of one length up to {}, got {l}", self.n_positions);
        }
        let places: Vec<u32> = (0..b).flat_map(|_| 0..l as u32).collect();
        let tokens = self.tokens(&ids.concat(), &[b, l])?;
        let mut x = (tokens + ops::embedding(&places, &[b, l], &self.position_embedding)?)?; // [B, L, D]
        for layer in &self.layers {
            x = layer.forward(&x, true)?;
        }
        self.final_layer_norm.forward(&x)
    }

    /// Width of the hidden states.
    pub(crate) fn width(&self) -> usize {
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
    pub(crate) fn mean_embedding(&self, ids: &[u32]) -> Result<Tensor> {
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

/// What a layer has to know.
struct Sizes {
    width: usize,
    inner: usize,
    n_heads: usize,
    activation: Activation,
    eps: f64,
}

impl Sizes {
    fn of_text(config: &Config) -> Self {
        Self {
            width: config.hidden_size,
            inner: config.intermediate_size,
            n_heads: config.num_attention_heads,
            activation: config.hidden_act,
            eps: config.layer_norm_eps,
        }
    }
}

impl Layer {
    fn load(w: &Weights, sizes: &Sizes) -> crate::Result<Self> {
        let Sizes { width: d, inner, n_heads, activation, eps } = *sizes;
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
            n_heads,
            activation,
            precision: w.precision(),
        })
    }

    fn forward(&self, x: &Tensor, causal: bool) -> Result<Tensor> {
        let (stream, dtype) = (x.dtype(), self.precision.dtype());
        let hidden = self.layer_norm1.forward(x)?.to_dtype(dtype)?;
        let (q, k, v) =
            (self.q_proj.forward(&hidden)?, self.k_proj.forward(&hidden)?, self.v_proj.forward(&hidden)?);
        let attended = self.out_proj.forward(&ops::attention(&q, &k, &v, self.n_heads, causal)?)?;
        let x = (x + attended.to_dtype(stream)?)?;
        let hidden = self.fc1.forward(&self.layer_norm2.forward(&x)?.to_dtype(dtype)?)?;
        x + self.fc2.forward(&ops::activate(&hidden, self.activation)?)?.to_dtype(stream)?
    }
}

/// `config.json` of the whole; the keys are those of transformers' `CLIPConfig`.
#[derive(Clone, Debug, Deserialize)]
pub struct PairConfig {
    /// The text encoder.
    pub(crate) text_config: Config,
    /// The picture encoder.
    pub vision_config: VisionConfig,
    /// Width of the space that both project to.
    #[serde(default = "projection")]
    pub(crate) projection_dim: usize,
}

/// The config of the image encoder; the defaults are those of ViT-B/32.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct VisionConfig {
    /// Width of the tokens.
    pub hidden_size: usize,
    /// Width inside each feed-forward.
    pub(crate) intermediate_size: usize,
    /// Layers.
    pub(crate) num_hidden_layers: usize,
    /// Heads of each attention.
    pub(crate) num_attention_heads: usize,
    /// Side of the pictures, in pixels.
    pub image_size: usize,
    /// Side of a patch, in pixels.
    pub(crate) patch_size: usize,
    /// Activation of each feed-forward.
    pub(crate) hidden_act: Activation,
    /// Eps of each norm.
    pub(crate) layer_norm_eps: f64,
}

impl Default for VisionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            image_size: 224,
            patch_size: 32,
            hidden_act: Activation::QuickGelu,
            layer_norm_eps: 1e-5,
        }
    }
}

fn projection() -> usize {
    512
}

impl PairConfig {
    /// Refuses sizes that cannot be a model.
    pub(crate) fn check(&self) -> crate::Result<()> {
        self.text_config.check()?;
        let vision = &self.vision_config;
        let positive = [self.projection_dim, vision.hidden_size, vision.intermediate_size, vision.image_size];
        refuse(!positive.contains(&0), "a size", 0, "every size above zero")?;
        let heads = vision.num_attention_heads;
        let divides = heads > 0 && vision.hidden_size.is_multiple_of(heads);
        refuse(divides, "num_attention_heads", heads, "a divisor of hidden_size")?;
        let patch = vision.patch_size;
        let fits = patch > 0 && vision.image_size.is_multiple_of(patch);
        refuse(fits, "patch_size", patch, "a divisor of image_size")
    }
}

/// Both encoders and their projections.
#[derive(Debug)]
pub struct Clip {
    text: ClipText,
    text_projection: Linear,
    vision: ClipVision,
    visual_projection: Linear,
}

impl Clip {
    /// From weights named as in transformers' `CLIPModel`: `text_model`, `text_projection`, `vision_model`,
    /// `visual_projection`.
    pub fn load(w: &Weights, config: &PairConfig) -> crate::Result<Self> {
        config.check()?;
        let (text, vision, shared) =
            (config.text_config.hidden_size, config.vision_config.hidden_size, config.projection_dim);
        Ok(Self {
            text: ClipText::load(w, &config.text_config)?,
            text_projection: Linear::load_no_bias(&w.pp("text_projection"), text, shared)?,
            vision: ClipVision::load(&w.pp("vision_model"), &config.vision_config)?,
            visual_projection: Linear::load_no_bias(&w.pp("visual_projection"), vision, shared)?,
        })
    }

    /// Normalised pictures `[B, 3, S, S]` to `[B, P]` in the shared space, of any length.
    pub(crate) fn pictures(&self, pictures: &Tensor) -> Result<Tensor> {
        self.visual_projection.forward(&self.vision.forward(pictures)?)
    }

    /// Token ids as for [`ClipText::forward`] to `[B, P]` in the shared space, of any length: what stands at the first
    /// `end` of each sequence.
    pub(crate) fn texts(&self, ids: &[Vec<u32>], end: u32) -> Result<Tensor> {
        let states = self.text.forward(ids)?; // [B, L, D]
        let pooled = ids.iter().enumerate().map(|(i, ids)| {
            let Some(place) = ids.iter().position(|id| *id == end) else {
                candle_core::bail!("clip: a sequence has no end")
            };
            states.narrow(0, i, 1)?.narrow(1, place, 1)?.squeeze(1)
        });
        self.text_projection.forward(&Tensor::cat(&pooled.collect::<Result<Vec<_>>>()?, 0)?)
    }
}

/// The picture encoder: a vision transformer with a norm before its layers.
#[derive(Debug)]
struct ClipVision {
    class_embedding: Param,
    patch_embedding: Conv2d,
    position_embedding: Param,
    pre_layrnorm: LayerNorm, // the checkpoint's spelling
    layers: Vec<Layer>,
    post_layernorm: LayerNorm,
    image_size: usize,
}

impl ClipVision {
    fn load(w: &Weights, config: &VisionConfig) -> crate::Result<Self> {
        let (d, patch, eps) = (config.hidden_size, config.patch_size, config.layer_norm_eps);
        let sizes = Sizes {
            width: d,
            inner: config.intermediate_size,
            n_heads: config.num_attention_heads,
            activation: config.hidden_act,
            eps,
        };
        let (embeddings, layers) = (w.pp("embeddings"), w.pp("encoder").pp("layers"));
        let n_tokens = 1 + (config.image_size / patch).pow(2);
        let spec = Conv2dSpec::padded(patch, 0);
        Ok(Self {
            class_embedding: embeddings.get("class_embedding", &[d])?,
            patch_embedding: Conv2d::load_no_bias(&embeddings.pp("patch_embedding"), 3, d, patch, spec)?,
            position_embedding: embeddings.pp("position_embedding").get("weight", &[n_tokens, d])?,
            pre_layrnorm: LayerNorm::load(&w.pp("pre_layrnorm"), d, eps)?,
            layers: (0..config.num_hidden_layers)
                .map(|i| Layer::load(&layers.pp(i), &sizes))
                .collect::<crate::Result<_>>()?,
            post_layernorm: LayerNorm::load(&w.pp("post_layernorm"), d, eps)?,
            image_size: config.image_size,
        })
    }

    /// `[B, 3, S, S]` to the class token behind the last norm, `[B, D]`.
    fn forward(&self, pictures: &Tensor) -> Result<Tensor> {
        let (b, side) = (pictures.dim(0)?, self.image_size);
        if pictures.dims() != [b, 3, side, side] {
            candle_core::bail!("clip: wanted pictures [B, 3, {side}, {side}], got {:?}", pictures.dims());
        }
        let patches = to_tokens(&self.patch_embedding.forward(pictures)?)?; // [B, n, D]
        let (class, places) =
            (self.class_embedding.weight(patches.dtype())?, self.position_embedding.weight(patches.dtype())?);
        let class = class.reshape((1, 1, class.elem_count()))?.repeat((b, 1, 1))?;
        let x = Tensor::cat(&[class, patches], 1)?.broadcast_add(&places.unsqueeze(0)?)?;
        let mut x = self.pre_layrnorm.forward(&x)?;
        for layer in &self.layers {
            x = layer.forward(&x, false)?;
        }
        self.post_layernorm.forward(&x.narrow(1, 0, 1)?)?.squeeze(1)
    }
}
