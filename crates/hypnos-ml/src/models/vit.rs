//! The vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929) as DINO has it (Caron et al. 2021, arXiv
//! 2104.14294): a picture to its class token.
//!
//! Names and order are those of `vision_transformer.py` in DINO's repository, and timm's. The position embedding is
//! not interpolated: pictures come at the size it was learned for.

use candle_core::{Result, Tensor};
use serde::Deserialize;

use super::refuse;
use crate::nn::{Conv2d, LayerNorm, Linear, to_tokens};
use crate::ops::{self, Activation, Conv2dSpec};
use crate::param::Param;
use crate::weights::Weights;

/// Sizes; the keys are those of transformers' `ViTConfig`.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Config {
    /// Width of the tokens, 384 in ViT-S.
    pub(crate) hidden_size: usize,
    /// Blocks, 12 in ViT-S.
    pub(crate) num_hidden_layers: usize,
    /// Heads of each attention, 6 in ViT-S.
    pub(crate) num_attention_heads: usize,
    /// Width inside each feed-forward; by default four times `hidden_size`.
    pub(crate) intermediate_size: Option<usize>,
    /// Side of a patch, in pixels.
    pub(crate) patch_size: usize,
    /// Side of the pictures, in pixels.
    #[serde(default = "image_size")]
    pub(crate) image_size: usize,
    /// Eps of each norm. DINO's own code has 1e-6; configs on the hub say 1e-12, which gives other numbers.
    #[serde(default = "eps")]
    pub(crate) layer_norm_eps: f64,
}

fn image_size() -> usize {
    224
}

fn eps() -> f64 {
    1e-6
}

impl Config {
    /// Refuses sizes that cannot be a model.
    pub(crate) fn check(&self) -> crate::Result<()> {
        let (width, heads, patch) = (self.hidden_size, self.num_attention_heads, self.patch_size);
        refuse(width > 0 && self.inner() > 0, "a size", 0, "every size above zero")?;
        refuse(
            heads > 0 && width.is_multiple_of(heads),
            "num_attention_heads",
            heads,
            "a divisor of hidden_size",
        )?;
        let fits = patch > 0 && self.image_size > 0 && self.image_size.is_multiple_of(patch);
        refuse(fits, "patch_size", patch, "a divisor of image_size")
    }

    /// Patches of a picture.
    fn n_patches(&self) -> usize {
        (self.image_size / self.patch_size).pow(2)
    }

    fn inner(&self) -> usize {
        self.intermediate_size.unwrap_or(4 * self.hidden_size)
    }
}

/// The network, without a head.
#[derive(Debug)]
pub(crate) struct Vit {
    patch_embed: Conv2d,
    cls_token: Param,
    pos_embed: Param,
    blocks: Vec<Block>,
    norm: LayerNorm,
    config: Config,
}

impl Vit {
    /// From weights named `cls_token`, `pos_embed`, `patch_embed.proj`, `blocks.N`, `norm`.
    pub(crate) fn load(w: &Weights, config: &Config) -> crate::Result<Self> {
        config.check()?;
        let (d, patch) = (config.hidden_size, config.patch_size);
        let blocks = (0..config.num_hidden_layers).map(|i| Block::load(&w.pp("blocks").pp(i), config));
        Ok(Self {
            patch_embed: Conv2d::load(
                &w.pp("patch_embed").pp("proj"),
                3,
                d,
                patch,
                Conv2dSpec::padded(patch, 0),
            )?,
            cls_token: w.get("cls_token", &[1, 1, d])?,
            pos_embed: w.get("pos_embed", &[1, 1 + config.n_patches(), d])?,
            blocks: blocks.collect::<crate::Result<_>>()?,
            norm: LayerNorm::load(&w.pp("norm"), d, config.layer_norm_eps)?,
            config: config.clone(),
        })
    }

    /// Normalised pictures `[B, 3, S, S]` to the class token behind the last norm, `[B, D]`.
    pub(crate) fn forward(&self, pictures: &Tensor) -> Result<Tensor> {
        let (b, side) = (pictures.dim(0)?, self.config.image_size);
        if pictures.dims() != [b, 3, side, side] {
            candle_core::bail!("vit: wanted pictures [B, 3, {side}, {side}], got {:?}", pictures.dims());
        }
        let patches = to_tokens(&self.patch_embed.forward(pictures)?)?; // [B, n, D]
        let class = self.cls_token.weight(patches.dtype())?.repeat((b, 1, 1))?;
        let places = self.pos_embed.weight(patches.dtype())?;
        let mut x = Tensor::cat(&[class, patches], 1)?.broadcast_add(&places)?;
        for block in &self.blocks {
            x = block.forward(&x)?;
        }
        self.norm.forward(&x.narrow(1, 0, 1)?)?.squeeze(1)
    }
}

#[derive(Debug)]
struct Block {
    norm1: LayerNorm,
    qkv: Linear,
    proj: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    n_heads: usize,
}

impl Block {
    fn load(w: &Weights, config: &Config) -> crate::Result<Self> {
        let (d, inner, eps) = (config.hidden_size, config.inner(), config.layer_norm_eps);
        let (attention, mlp) = (w.pp("attn"), w.pp("mlp"));
        Ok(Self {
            norm1: LayerNorm::load(&w.pp("norm1"), d, eps)?,
            qkv: Linear::load(&attention.pp("qkv"), d, 3 * d)?,
            proj: Linear::load(&attention.pp("proj"), d, d)?,
            norm2: LayerNorm::load(&w.pp("norm2"), d, eps)?,
            fc1: Linear::load(&mlp.pp("fc1"), d, inner)?,
            fc2: Linear::load(&mlp.pp("fc2"), inner, d)?,
            n_heads: config.num_attention_heads,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let d = x.dim(2)?;
        let qkv = self.qkv.forward(&self.norm1.forward(x)?)?; // [B, L, 3 D]
        let part = |i: usize| qkv.narrow(2, i * d, d);
        let seen = ops::attention(&part(0)?, &part(1)?, &part(2)?, self.n_heads, false)?;
        let x = (x + self.proj.forward(&seen)?)?;
        let hidden = self.fc1.forward(&self.norm2.forward(&x)?)?;
        x + self.fc2.forward(&ops::activate(&hidden, Activation::Gelu)?)?
    }
}
