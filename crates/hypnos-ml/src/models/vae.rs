//! The variational autoencoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752): pictures to latents and
//! back.
//!
//! Ports diffusers' `AutoencoderKL`. The scaling factor of the latents lives here and nowhere else.

use candle_core::{Result, Tensor};
use serde::Deserialize;

use super::refuse;
use crate::nn::{Conv2d, GroupNorm, Linear, Resnet, ResnetConfig, to_tokens};
use crate::ops::{self, Activation, Conv2dSpec};
use crate::precision::Precision;
use crate::weights::Weights;

mod dry;

/// Eps of every norm of the autoencoder; diffusers has it as a constant too.
const EPS: f64 = 1e-6;

/// `vae/config.json`. What it leaves out is as in the reference's class.
#[derive(Clone, Debug, Deserialize)]
pub struct Config {
    /// Channels of the picture.
    #[serde(default = "rgb")]
    pub(crate) in_channels: usize,
    /// Channels of the picture that comes out.
    #[serde(default = "rgb")]
    pub(crate) out_channels: usize,
    /// Channels of the latents.
    #[serde(default = "four")]
    pub(crate) latent_channels: usize,
    /// Channels of each level, from the picture down. Each level but the last halves the size.
    #[serde(default = "sixty_four")]
    pub(crate) block_out_channels: Vec<usize>,
    /// Residual blocks of each level of the encoder; the decoder has one more.
    #[serde(default = "one")]
    pub(crate) layers_per_block: usize,
    /// Groups of each norm.
    #[serde(default = "groups")]
    pub(crate) norm_num_groups: usize,
    /// Activation.
    #[serde(default = "silu")]
    pub(crate) act_fn: Activation,
    /// What latents are multiplied with for the UNet.
    #[serde(default = "scaling")]
    pub(crate) scaling_factor: f64,
    /// Whether the middle has an attention.
    #[serde(default = "yes")]
    pub(crate) mid_block_add_attention: bool,
    /// Whether a 1x1 convolution follows the encoder.
    #[serde(default = "yes")]
    pub(crate) use_quant_conv: bool,
    /// Whether a 1x1 convolution precedes the decoder.
    #[serde(default = "yes")]
    pub(crate) use_post_quant_conv: bool,
    /// One kind for each level of the encoder.
    #[serde(default = "one_down_block")]
    down_block_types: Vec<String>,
    /// The same for the decoder.
    #[serde(default = "one_up_block")]
    up_block_types: Vec<String>,
    #[serde(default)]
    shift_factor: Option<f64>,
    #[serde(default)]
    latents_mean: Option<Vec<f64>>,
}

fn one_down_block() -> Vec<String> {
    vec!["DownEncoderBlock2D".into()]
}

fn one_up_block() -> Vec<String> {
    vec!["UpDecoderBlock2D".into()]
}

fn rgb() -> usize {
    3
}

fn sixty_four() -> Vec<usize> {
    vec![64]
}

fn four() -> usize {
    4
}

fn one() -> usize {
    1
}

fn groups() -> usize {
    32
}

fn silu() -> Activation {
    Activation::Silu
}

fn scaling() -> f64 {
    0.18215
}

fn yes() -> bool {
    true
}

impl Config {
    /// Refuses what this file does not build.
    pub(crate) fn check(&self) -> crate::Result<()> {
        let (channels, groups) = (&self.block_out_channels, self.norm_num_groups);
        refuse(!channels.is_empty(), "block_out_channels", channels, "at least one level")?;
        let divided = groups > 0 && channels.iter().all(|&c| c > 0 && c % groups == 0);
        refuse(divided, "norm_num_groups", groups, "a divisor of every one of block_out_channels")?;
        for (key, kinds, wanted) in [
            ("down_block_types", &self.down_block_types, "DownEncoderBlock2D"),
            ("up_block_types", &self.up_block_types, "UpDecoderBlock2D"),
        ] {
            refuse(kinds.iter().all(|kind| kind == wanted), key, kinds, wanted)?;
            refuse(kinds.len() == channels.len(), key, kinds, "one per level")?;
        }
        refuse(
            self.shift_factor.is_none_or(|shift| shift == 0.0),
            "shift_factor",
            self.shift_factor,
            "none",
        )?;
        refuse(self.latents_mean.is_none(), "latents_mean", &self.latents_mean, "none")?;
        refuse(self.scaling_factor > 0.0, "scaling_factor", self.scaling_factor, "a number above zero")
    }

    /// Pixels per latent along one side.
    pub(crate) fn factor(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }

    fn resnet(&self) -> ResnetConfig {
        ResnetConfig { n_groups: self.norm_num_groups, eps: EPS, activation: self.act_fn, time_width: None }
    }
}

/// The distribution of a picture's latents, before scaling: mean and logarithm of the variance, both `[B, c, h, w]`.
#[derive(Clone, Debug)]
pub struct Moments {
    /// Mean.
    pub mean: Tensor,
    /// Logarithm of the variance, within -30..20.
    pub logvar: Tensor,
}

/// The autoencoder.
#[derive(Debug)]
pub struct Vae {
    encoder: Encoder,
    quant_conv: Option<Conv2d>,
    post_quant_conv: Option<Conv2d>,
    decoder: Decoder,
    config: Config,
    precision: Precision,
}

impl Vae {
    /// From weights named as diffusers names them, with the old or the new names of the attention. It computes in the
    /// precision of the weights, and its results have the dtype of its inputs.
    pub fn load(w: &Weights, config: &Config) -> crate::Result<Self> {
        config.check()?;
        let n = config.latent_channels;
        let pointwise = |name: &str, n| Conv2d::load(&w.pp(name), n, n, 1, Conv2dSpec::padded(1, 0));
        Ok(Self {
            encoder: Encoder::load(&w.pp("encoder"), config)?,
            quant_conv: config.use_quant_conv.then(|| pointwise("quant_conv", 2 * n)).transpose()?,
            post_quant_conv: config
                .use_post_quant_conv
                .then(|| pointwise("post_quant_conv", n))
                .transpose()?,
            decoder: Decoder::load(&w.pp("decoder"), config)?,
            config: config.clone(),
            precision: w.precision(),
        })
    }

    /// Pixels per latent along one side.
    pub fn factor(&self) -> usize {
        self.config.factor()
    }

    /// What the UNet's latents are multiples of: UNet latents = scaling factor x autoencoder latents.
    pub fn scaling_factor(&self) -> f64 {
        self.config.scaling_factor
    }

    /// Pictures `[B, 3, H, W]`, signed, to the distribution of their latents `[B, c, H/f, W/f]`.
    pub fn encode(&self, pictures: &Tensor) -> Result<Moments> {
        let mut x = self.encoder.forward(&pictures.to_dtype(self.precision.dtype())?)?;
        if let Some(conv) = &self.quant_conv {
            x = conv.forward(&x)?;
        }
        let parts = x.to_dtype(pictures.dtype())?.chunk(2, 1)?;
        Ok(Moments { mean: parts[0].contiguous()?, logvar: parts[1].clamp(-30.0, 20.0)?.contiguous()? })
    }

    /// The UNet's latents of pictures: `(mean + exp(logvar / 2) noise) * scaling factor`, `noise` unit normal.
    pub fn latents(&self, moments: &Moments, noise: &Tensor) -> Result<Tensor> {
        let std = (&moments.logvar * 0.5)?.exp()?;
        (&moments.mean + (std * noise)?)? * self.config.scaling_factor
    }

    /// The UNet's latents `[B, c, h, w]` to pictures `[B, 3, h f, w f]`, about signed (not clamped). Differentiable.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        self.decode_with(latents, false)
    }

    /// The same, whose blocks are computed again in the backward if `checkpointing`. Value and gradient are the same to
    /// the bit: no value goes to more than one block.
    pub fn decode_with(&self, latents: &Tensor, checkpointing: bool) -> Result<Tensor> {
        if latents.device().is_cuda() {
            return ops::recorded(&[latents], |inputs| self.decoded(&inputs[0], checkpointing));
        }
        self.decoded(latents, checkpointing)
    }

    fn decoded(&self, latents: &Tensor, checkpointing: bool) -> Result<Tensor> {
        let mut x = (latents / self.config.scaling_factor)?.to_dtype(self.precision.dtype())?;
        if let Some(conv) = &self.post_quant_conv {
            x = conv.forward(&x)?;
        }
        self.decoder.forward(&x, checkpointing)?.to_dtype(latents.dtype())
    }
}

#[derive(Debug)]
struct Encoder {
    conv_in: Conv2d,
    down_blocks: Vec<DownBlock>,
    mid_block: MidBlock,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

#[derive(Debug)]
struct DownBlock {
    resnets: Vec<Resnet>,
    downsampler: Option<Conv2d>,
}

impl Encoder {
    fn load(w: &Weights, config: &Config) -> crate::Result<Self> {
        let channels = &config.block_out_channels;
        let deepest = channels[channels.len() - 1];
        let same = Conv2dSpec::padded(1, 1);
        let mut down_blocks = Vec::new();
        for (i, &n_out) in channels.iter().enumerate() {
            let w = w.pp("down_blocks").pp(i);
            let n_in = channels[i.saturating_sub(1)];
            let resnets = (0..config.layers_per_block).map(|j| {
                Resnet::load(
                    &w.pp("resnets").pp(j),
                    if j == 0 { n_in } else { n_out },
                    n_out,
                    &config.resnet(),
                )
            });
            let resnets = resnets.collect::<crate::Result<_>>()?;
            // The reference pads at the right and bottom only.
            let halve = Conv2dSpec { stride: 2, before: 0, after: 1 };
            let down = || Conv2d::load(&w.pp("downsamplers").pp(0).pp("conv"), n_out, n_out, 3, halve);
            let downsampler = (i + 1 < channels.len()).then(down).transpose()?;
            down_blocks.push(DownBlock { resnets, downsampler });
        }
        Ok(Self {
            conv_in: Conv2d::load(&w.pp("conv_in"), config.in_channels, channels[0], 3, same)?,
            down_blocks,
            mid_block: MidBlock::load(&w.pp("mid_block"), deepest, config)?,
            conv_norm_out: norm_out(w, deepest, config)?,
            conv_out: Conv2d::load(&w.pp("conv_out"), deepest, 2 * config.latent_channels, 3, same)?,
        })
    }

    fn forward(&self, pictures: &Tensor) -> Result<Tensor> {
        let mut x = self.conv_in.forward(pictures)?;
        for block in &self.down_blocks {
            for resnet in &block.resnets {
                x = resnet.forward(&x, None)?;
            }
            if let Some(conv) = &block.downsampler {
                x = conv.forward(&x)?;
            }
        }
        x = self.mid_block.forward(&x, false)?;
        self.conv_out.forward(&self.conv_norm_out.forward(&x)?)
    }
}

#[derive(Debug)]
struct Decoder {
    conv_in: Conv2d,
    mid_block: MidBlock,
    up_blocks: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

#[derive(Debug)]
struct UpBlock {
    resnets: Vec<Resnet>,
    upsampler: Option<Conv2d>,
}

impl Decoder {
    fn load(w: &Weights, config: &Config) -> crate::Result<Self> {
        let channels: Vec<usize> = config.block_out_channels.iter().rev().copied().collect();
        let same = Conv2dSpec::padded(1, 1);
        let mut up_blocks = Vec::new();
        for (i, &n_out) in channels.iter().enumerate() {
            let w = w.pp("up_blocks").pp(i);
            let n_in = channels[i.saturating_sub(1)];
            let resnets = (0..=config.layers_per_block).map(|j| {
                Resnet::load(
                    &w.pp("resnets").pp(j),
                    if j == 0 { n_in } else { n_out },
                    n_out,
                    &config.resnet(),
                )
            });
            let resnets = resnets.collect::<crate::Result<_>>()?;
            let up = || Conv2d::load(&w.pp("upsamplers").pp(0).pp("conv"), n_out, n_out, 3, same);
            let upsampler = (i + 1 < channels.len()).then(up).transpose()?;
            up_blocks.push(UpBlock { resnets, upsampler });
        }
        let shallowest = channels[channels.len() - 1];
        Ok(Self {
            conv_in: Conv2d::load(&w.pp("conv_in"), config.latent_channels, channels[0], 3, same)?,
            mid_block: MidBlock::load(&w.pp("mid_block"), channels[0], config)?,
            up_blocks,
            conv_norm_out: norm_out(w, shallowest, config)?,
            conv_out: Conv2d::load(&w.pp("conv_out"), shallowest, config.out_channels, 3, same)?,
        })
    }

    fn forward(&self, latents: &Tensor, checkpointing: bool) -> Result<Tensor> {
        let mut x = self.mid_block.forward(&self.conv_in.forward(latents)?, checkpointing)?;
        for block in &self.up_blocks {
            for resnet in &block.resnets {
                let resnet = resnet.clone();
                x = run(&x, checkpointing, move |x| resnet.forward(x, None))?;
            }
            if let Some(conv) = &block.upsampler {
                let conv = conv.clone();
                x = run(&x, checkpointing, move |x| {
                    let (_, _, h, w) = x.dims4()?;
                    conv.forward(&ops::upsample_nearest(x, (2 * h, 2 * w))?)
                })?;
            }
        }
        let (norm, conv) = (self.conv_norm_out.clone(), self.conv_out.clone());
        run(&x, checkpointing, move |x| conv.forward(&norm.forward(x)?))
    }
}

/// `block(x)`, whose inside is computed again in the backward if `checkpointing`. A block shares its weights.
fn run(
    x: &Tensor,
    checkpointing: bool,
    block: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    if checkpointing { ops::checkpoint(&[x], move |inputs| block(&inputs[0])) } else { block(x) }
}

fn norm_out(w: &Weights, n: usize, config: &Config) -> crate::Result<GroupNorm> {
    GroupNorm::load(&w.pp("conv_norm_out"), n, config.norm_num_groups, EPS, Some(config.act_fn))
}

#[derive(Debug)]
struct MidBlock {
    resnets: [Resnet; 2],
    attention: Option<Attention>,
}

impl MidBlock {
    fn load(w: &Weights, n: usize, config: &Config) -> crate::Result<Self> {
        let resnet = |i: usize| Resnet::load(&w.pp("resnets").pp(i), n, n, &config.resnet());
        let attention = || Attention::load(&w.pp("attentions").pp(0), n, config.norm_num_groups);
        Ok(Self {
            resnets: [resnet(0)?, resnet(1)?],
            attention: config.mid_block_add_attention.then(attention).transpose()?,
        })
    }

    fn forward(&self, x: &Tensor, checkpointing: bool) -> Result<Tensor> {
        let [first, second] = self.resnets.clone();
        let mut x = run(x, checkpointing, move |x| first.forward(x, None))?;
        if let Some(attention) = self.attention.clone() {
            x = run(&x, checkpointing, move |x| attention.forward(x))?;
        }
        run(&x, checkpointing, move |x| second.forward(x, None))
    }
}

/// Self-attention over all places of the picture, one head.
#[derive(Clone, Debug)]
struct Attention {
    group_norm: GroupNorm,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
}

impl Attention {
    fn load(w: &Weights, n: usize, n_groups: usize) -> crate::Result<Self> {
        Ok(Self {
            group_norm: GroupNorm::load(&w.pp("group_norm"), n, n_groups, EPS, None)?,
            to_q: Linear::load(&w.pp("to_q"), n, n)?,
            to_k: Linear::load(&w.pp("to_k"), n, n)?,
            to_v: Linear::load(&w.pp("to_v"), n, n)?,
            to_out: Linear::load(&w.pp("to_out").pp(0), n, n)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let tokens = to_tokens(&self.group_norm.forward(x)?)?; // [B, h w, C]
        let (q, k, v) =
            (self.to_q.forward(&tokens)?, self.to_k.forward(&tokens)?, self.to_v.forward(&tokens)?);
        self.to_out.forward_to_picture(x, &ops::attention(&q, &k, &v, 1, false)?)
    }
}
