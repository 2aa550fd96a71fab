//! The latent discriminator (HYPNOS, arXiv 2410.14265, section 3.4, fig. 3a): does a latent show the product?
//!
//! A light vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929) of three layers behind three convolutions,
//! which quarter each side. The paper gives no sizes.
//! Assumption: 3x3 kernels, strides 1, 2, 2, group norm and SiLU after each; width 192, 3 heads, a class token, norms
//! before each branch, feed-forwards of four widths with GELU; one logit through a sigmoid.

use candle_core::{D, Result, Tensor};

use super::refuse;
use crate::nn::{Conv2d, GroupNorm, LayerNorm, Linear, sigmoid, to_tokens};
use crate::ops::{self, Activation, Conv2dSpec};
use crate::param::Param;
use crate::weights::Weights;

mod dry;

/// Strides of the convolutions.
const STRIDES: [usize; 3] = [1, 2, 2];

/// Eps of every norm, torch's default.
const EPS: f64 = 1e-5;

/// Sizes of a discriminator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Rows and columns of the latents.
    pub latent_side: usize,
    /// Width of the tokens; the first two convolutions have a quarter and a half of it.
    pub width: usize,
    /// Heads of each attention.
    pub n_heads: usize,
    /// Layers of the transformer.
    pub n_layers: usize,
    /// Groups of the norm after each convolution.
    pub n_groups: usize,
}

impl Config {
    /// The sizes that HYPNOS is trained with, for latents of a bundle's shape.
    pub(crate) fn new(latent_channels: usize, latent_side: usize) -> Self {
        Self { latent_channels, latent_side, width: 192, n_heads: 3, n_layers: 3, n_groups: 8 }
    }

    /// Rows and columns of tokens.
    pub(crate) fn token_side(&self) -> usize {
        STRIDES.iter().fold(self.latent_side, |side, stride| side.div_ceil(*stride))
    }

    fn check(&self) -> crate::Result<()> {
        let Self { latent_channels, latent_side, width, n_heads, n_layers, n_groups } = *self;
        refuse(latent_channels > 0, "latent_channels", latent_channels, "one at least")?;
        refuse(latent_side > 0, "latent_side", latent_side, "one at least")?;
        refuse(n_layers > 0, "n_layers", n_layers, "one at least")?;
        refuse(n_heads > 0 && width.is_multiple_of(n_heads), "n_heads", n_heads, "a divisor of the width")?;
        let grouped = n_groups > 0 && width.is_multiple_of(4 * n_groups);
        refuse(grouped && width > 0, "n_groups", n_groups, "a divisor of a quarter of the width")
    }
}

/// The discriminator.
#[derive(Debug)]
pub struct Discriminator {
    stem: Vec<(Conv2d, GroupNorm)>,
    class_embedding: Param,
    position_embedding: Param,
    layers: Vec<Layer>,
    norm: LayerNorm,
    head: Linear,
    config: Config,
}

impl Discriminator {
    /// From weights by these names: `stem.0.{conv,norm}`, `class_embedding`, `position_embedding`,
    /// `layers.0.{norm1,self_attn.{q,k,v,out}_proj,norm2,linear1,linear2}`, `norm`, `head`.
    pub fn load(w: &Weights, config: &Config) -> crate::Result<Self> {
        config.check()?;
        let d = config.width;
        let widths = [config.latent_channels, d / 4, d / 2, d];
        let stem = STRIDES.iter().enumerate().map(|(i, &stride)| {
            let (w, silu) = (w.pp("stem").pp(i), Some(Activation::Silu));
            let conv =
                Conv2d::load(&w.pp("conv"), widths[i], widths[i + 1], 3, Conv2dSpec::padded(stride, 1))?;
            Ok((conv, GroupNorm::load(&w.pp("norm"), widths[i + 1], config.n_groups, EPS, silu)?))
        });
        let n_tokens = 1 + config.token_side().pow(2);
        Ok(Self {
            stem: stem.collect::<crate::Result<_>>()?,
            class_embedding: w.pp("class_embedding").get("weight", &[1, d])?,
            position_embedding: w.pp("position_embedding").get("weight", &[n_tokens, d])?,
            layers: (0..config.n_layers)
                .map(|i| Layer::load(&w.pp("layers").pp(i), config))
                .collect::<crate::Result<_>>()?,
            norm: LayerNorm::load(&w.pp("norm"), d, EPS)?,
            head: Linear::load(&w.pp("head"), d, 1)?,
            config: config.clone(),
        })
    }

    /// Latents `[B, c, h, w]` in the UNet's scale to scores `[B]` in 0..1, 1 for the product. Differentiable in both
    /// latents and weights.
    pub fn forward(&self, latents: &Tensor) -> Result<Tensor> {
        let mut x = self.tokens(latents)?;
        for layer in &self.layers {
            x = layer.forward(&x)?;
        }
        let class = self.norm.forward(&x.narrow(1, 0, 1)?)?; // [B, 1, D]
        sigmoid(&self.head.forward(&class)?.flatten_all()?)
    }

    /// Where the class token looks in the last layer (fig. 3b): `[B, N, h/4, w/4]`, each head's weights on the tokens,
    /// which sum to 1 less what it keeps for itself.
    pub fn attention(&self, latents: &Tensor) -> Result<Tensor> {
        let mut x = self.tokens(latents)?;
        let Some((last, before)) = self.layers.split_last() else {
            candle_core::bail!("discriminator: no layers")
        };
        for layer in before {
            x = layer.forward(&x)?;
        }
        let weights = last.class_attention(&x)?; // [B, N, 1 + hw]
        let (b, n, l) = weights.dims3()?;
        let side = self.config.token_side();
        weights.narrow(2, 1, l - 1)?.reshape((b, n, side, side))
    }

    /// `[B, c, h, w]` to `[B, 1 + hw/16, D]`, the class token first.
    fn tokens(&self, latents: &Tensor) -> Result<Tensor> {
        let Config { latent_channels: c, latent_side: side, width, .. } = self.config;
        let (b, ..) = latents.dims4()?;
        if latents.dims() != [b, c, side, side] {
            candle_core::bail!(
                "discriminator: wanted latents [B, {c}, {side}, {side}], got {:?}",
                latents.dims()
            );
        }
        let mut x = latents.clone();
        for (conv, norm) in &self.stem {
            x = norm.forward(&conv.forward(&x)?)?;
        }
        let class = ops::embedding(&vec![0; b], &[b, 1], &self.class_embedding)?;
        let x = Tensor::cat(&[class, to_tokens(&x)?], 1)?;
        let n_tokens = x.dim(1)?;
        let places: Vec<u32> = (0..b).flat_map(|_| 0..n_tokens as u32).collect();
        debug_assert_eq!(x.dim(2)?, width);
        x + ops::embedding(&places, &[b, n_tokens], &self.position_embedding)?
    }
}

#[derive(Debug)]
struct Layer {
    norm1: LayerNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    norm2: LayerNorm,
    linear1: Linear,
    linear2: Linear,
    n_heads: usize,
}

impl Layer {
    fn load(w: &Weights, config: &Config) -> crate::Result<Self> {
        let (d, attention) = (config.width, w.pp("self_attn"));
        Ok(Self {
            norm1: LayerNorm::load(&w.pp("norm1"), d, EPS)?,
            q_proj: Linear::load(&attention.pp("q_proj"), d, d)?,
            k_proj: Linear::load(&attention.pp("k_proj"), d, d)?,
            v_proj: Linear::load(&attention.pp("v_proj"), d, d)?,
            out_proj: Linear::load(&attention.pp("out_proj"), d, d)?,
            norm2: LayerNorm::load(&w.pp("norm2"), d, EPS)?,
            linear1: Linear::load(&w.pp("linear1"), d, 4 * d)?,
            linear2: Linear::load(&w.pp("linear2"), 4 * d, d)?,
            n_heads: config.n_heads,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let hidden = self.norm1.forward(x)?;
        let (q, k, v) =
            (self.q_proj.forward(&hidden)?, self.k_proj.forward(&hidden)?, self.v_proj.forward(&hidden)?);
        let x = (x + self.out_proj.forward(&ops::attention(&q, &k, &v, self.n_heads, false)?)?)?;
        let hidden = self.linear1.forward(&self.norm2.forward(&x)?)?;
        x + self.linear2.forward(&ops::activate(&hidden, Activation::Gelu)?)?
    }

    /// What the first token attends to, head by head: `[B, N, L]`.
    fn class_attention(&self, x: &Tensor) -> Result<Tensor> {
        let (b, l, d) = x.dims3()?;
        let (hidden, n) = (self.norm1.forward(x)?, self.n_heads);
        let heads = |x: Tensor, l: usize| x.reshape((b, l, n, d / n))?.transpose(1, 2)?.contiguous();
        let q = heads(self.q_proj.forward(&hidden.narrow(1, 0, 1)?)?, 1)?; // [B, N, 1, K]
        let k = heads(self.k_proj.forward(&hidden)?, l)?; // [B, N, L, K]
        let scores = (q.broadcast_mul(&k)?.sum(D::Minus1)? / ((d / n) as f64).sqrt())?;
        ops::softmax(&scores)
    }
}
