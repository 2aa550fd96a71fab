//! The UNet of latent diffusion (Rombach et al. 2022, arXiv 2112.10752): noisy latents, a timestep for each image and a
//! text, to the predicted noise (or velocity).
//!
//! Ports diffusers' `UNet2DConditionModel` for the block types of Stable Diffusion 1.x and 2.x. Latents of any size: where
//! halving does not come out even, the way up takes the sizes of the way down, as the reference does.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use serde::Deserialize;
use serde_json::Value;

use super::refuse;
use crate::nn::{Conv2d, GroupNorm, LayerNorm, Linear, Resnet, ResnetConfig, Time};
use crate::ops::{self, Activation, Conv2dSpec};
use crate::precision::Precision;
use crate::weights::Weights;
use crate::{Error, param::Param};

mod dry;

/// One number for every level, or one for each.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum PerLevel {
    /// The same at every level.
    Same(usize),
    /// From the shallowest level down.
    Each(Vec<usize>),
}

impl PerLevel {
    fn at(&self, level: usize) -> usize {
        match self {
            Self::Same(n) => *n,
            Self::Each(each) => each.get(level).copied().unwrap_or(0),
        }
    }

    fn fits(&self, n_levels: usize) -> bool {
        let counted = !matches!(self, Self::Each(each) if each.len() != n_levels);
        counted && (0..n_levels).all(|level| self.at(level) > 0)
    }
}

/// One number for height and width, or one for each.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(untagged)]
pub enum SampleSize {
    /// Of squares.
    Side(usize),
    /// Height and width.
    Sides([usize; 2]),
}

impl SampleSize {
    /// Side of the largest square within it.
    pub fn side(self) -> usize {
        match self {
            Self::Side(side) => side,
            Self::Sides([height, width]) => height.min(width),
        }
    }
}

/// `unet/config.json`. What it leaves out is as in the reference's class.
#[derive(Clone, Debug, Deserialize)]
pub struct Config {
    /// Channels of the latents.
    #[serde(default = "four")]
    pub(crate) in_channels: usize,
    /// Channels of the prediction.
    #[serde(default = "four")]
    pub(crate) out_channels: usize,
    /// Channels of each level, from the shallowest down. Each level but the last halves the size.
    #[serde(default = "block_out_channels")]
    pub(crate) block_out_channels: Vec<usize>,
    /// Residual blocks of each level on the way down; one more on the way up.
    #[serde(default = "two")]
    pub(crate) layers_per_block: PerLevel,
    /// Kind of each level on the way down: with or without attention.
    #[serde(default = "down_block_types")]
    pub(crate) down_block_types: Vec<String>,
    /// Kind of each level on the way up.
    #[serde(default = "up_block_types")]
    pub(crate) up_block_types: Vec<String>,
    /// Heads of each attention. The reference's name for it is a slip it keeps for old checkpoints' sake.
    #[serde(default = "eight")]
    pub(crate) attention_head_dim: PerLevel,
    /// Heads of each attention, where a checkpoint says it by its right name.
    #[serde(default)]
    pub(crate) num_attention_heads: Option<PerLevel>,
    /// Width of the text's hidden states.
    #[serde(default = "cross_attention_dim")]
    pub cross_attention_dim: usize,
    /// Layers of each transformer.
    #[serde(default = "one")]
    pub(crate) transformer_layers_per_block: PerLevel,
    /// Whether a transformer's projections are stored as matrices (SD 2) or 1x1 convolutions (SD 1).
    #[serde(default)]
    pub(crate) use_linear_projection: bool,
    /// Activation.
    #[serde(default = "silu")]
    pub(crate) act_fn: Activation,
    /// Groups of each norm.
    #[serde(default = "groups")]
    pub(crate) norm_num_groups: usize,
    /// Eps of the residual blocks' norms.
    #[serde(default = "eps")]
    pub(crate) norm_eps: f64,
    /// Whether the time embedding has the cosines first.
    #[serde(default = "yes")]
    pub(crate) flip_sin_to_cos: bool,
    /// Shift of the time embedding's frequencies.
    #[serde(default)]
    pub(crate) freq_shift: f64,
    /// Size of the latents it was trained on.
    pub(crate) sample_size: Option<SampleSize>,
    /// Everything else, looked through by [`Config::check`].
    #[serde(flatten)]
    rest: serde_json::Map<String, Value>,
}

fn block_out_channels() -> Vec<usize> {
    vec![320, 640, 1280, 1280]
}

fn down_block_types() -> Vec<String> {
    ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]
        .map(str::to_owned)
        .into()
}

fn up_block_types() -> Vec<String> {
    ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"].map(str::to_owned).into()
}

fn cross_attention_dim() -> usize {
    1280
}

fn four() -> usize {
    4
}

fn one() -> PerLevel {
    PerLevel::Same(1)
}

fn two() -> PerLevel {
    PerLevel::Same(2)
}

fn eight() -> PerLevel {
    PerLevel::Same(8)
}

fn silu() -> Activation {
    Activation::Silu
}

fn groups() -> usize {
    32
}

fn eps() -> f64 {
    1e-5
}

fn yes() -> bool {
    true
}

/// Settings of the reference that this file does not build: they must be off, null or false.
///
/// `upcast_attention` (Stable Diffusion 2.1) may be on: it asks for scores in f32, which these always are.
const OFF: [&str; 19] = [
    "center_input_sample",
    "only_cross_attention",
    "dual_cross_attention",
    "class_embeddings_concat",
    "resnet_skip_time_act",
    "class_embed_type",
    "addition_embed_type",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "num_class_embeds",
    "time_cond_proj_dim",
    "time_embedding_act_fn",
    "time_embedding_dim",
    "timestep_post_act",
    "cross_attention_norm",
    "mid_block_only_cross_attention",
    "reverse_transformer_layers_per_block",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
];

/// Settings of which one value alone is honoured, a number or a word.
const FIXED: [(&str, &str); 9] = [
    ("conv_in_kernel", "3"),
    ("conv_out_kernel", "3"),
    ("downsample_padding", "1"),
    ("mid_block_scale_factor", "1"),
    ("resnet_out_scale_factor", "1"),
    ("mid_block_type", "UNetMidBlock2DCrossAttn"),
    ("resnet_time_scale_shift", "default"),
    ("time_embedding_type", "positional"),
    ("attention_type", "default"),
];

impl Config {
    /// Refuses what this file does not build.
    pub(crate) fn check(&self) -> crate::Result<()> {
        let (channels, n) = (&self.block_out_channels, self.block_out_channels.len());
        refuse(n > 0, "block_out_channels", channels, "at least one level")?;
        let groups = self.norm_num_groups;
        let divided = groups > 0 && channels.iter().all(|&c| c > 0 && c % groups == 0);
        refuse(divided, "norm_num_groups", groups, "a divisor of every one of block_out_channels")?;
        for (key, kinds, plain, attending) in [
            ("down_block_types", &self.down_block_types, "DownBlock2D", "CrossAttnDownBlock2D"),
            ("up_block_types", &self.up_block_types, "UpBlock2D", "CrossAttnUpBlock2D"),
        ] {
            refuse(kinds.len() == n, key, kinds, "one per level of block_out_channels")?;
            let known = kinds.iter().all(|kind| kind == plain || kind == attending);
            refuse(known, key, kinds, &format!("{plain} or {attending}"))?;
        }
        refuse(
            self.layers_per_block.fits(n),
            "layers_per_block",
            &self.layers_per_block,
            "one number or one per level",
        )?;
        let transformers = &self.transformer_layers_per_block;
        refuse(
            transformers.fits(n),
            "transformer_layers_per_block",
            transformers,
            "one number or one per level",
        )?;
        let heads = self.heads();
        let divides = heads.fits(n) && channels.iter().enumerate().all(|(i, c)| c % heads.at(i) == 0);
        refuse(divides, "attention_head_dim", heads, "numbers of heads that divide block_out_channels")?;
        self.check_rest()
    }

    fn check_rest(&self) -> crate::Result<()> {
        for key in OFF {
            let value = self.rest.get(key).unwrap_or(&Value::Null);
            refuse(matches!(value, Value::Null | Value::Bool(false)), key, value, "null or false")?;
        }
        for (key, wanted) in FIXED {
            let Some(value) = self.rest.get(key) else { continue };
            let same = match value {
                Value::Number(number) => number.as_f64() == wanted.parse().ok(),
                Value::String(text) => text == wanted,
                _ => false,
            };
            refuse(same, key, value, wanted)?;
        }
        Ok(())
    }

    /// Residual blocks of a level on the way down.
    pub(crate) fn n_layers(&self, level: usize) -> usize {
        self.layers_per_block.at(level)
    }

    /// Whether block `i` on the way up, the deepest being the first, attends to the text.
    pub(crate) fn attends_up(&self, i: usize) -> bool {
        self.up_block_types[i].starts_with("CrossAttn")
    }

    fn heads(&self) -> &PerLevel {
        self.num_attention_heads.as_ref().unwrap_or(&self.attention_head_dim)
    }

    fn time_width(&self) -> usize {
        4 * self.block_out_channels[0]
    }

    fn resnet(&self) -> ResnetConfig {
        ResnetConfig {
            n_groups: self.norm_num_groups,
            eps: self.norm_eps,
            activation: self.act_fn,
            time_width: Some(self.time_width()),
        }
    }
}

/// The UNet.
#[derive(Clone, Debug)]
pub struct Unet {
    time_embedding: (Linear, Linear),
    conv_in: Conv2d,
    down_blocks: Vec<DownBlock>,
    mid_block: MidBlock,
    up_blocks: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
    config: Config,
    precision: Precision,
    /// Whether blocks are computed again in the backward instead of kept: less memory for a third more time. Where it
    /// trains, the losses hold the decoder to the same.
    pub checkpointing: bool,
}

impl Unet {
    /// From weights named as diffusers names them. It computes in what they are for.
    pub fn load(w: &Weights, config: &Config) -> crate::Result<Self> {
        config.check()?;
        let channels = &config.block_out_channels;
        let (n, time) = (channels.len(), w.pp("time_embedding"));
        let same = Conv2dSpec::padded(1, 1);
        let down_blocks = (0..n).map(|i| DownBlock::load(&w.pp("down_blocks").pp(i), i, config));
        let up_blocks = (0..n).map(|i| UpBlock::load(&w.pp("up_blocks").pp(i), i, config));
        let norm = &w.pp("conv_norm_out");
        Ok(Self {
            time_embedding: (
                Linear::load(&time.pp("linear_1"), channels[0], config.time_width())?,
                Linear::load(&time.pp("linear_2"), config.time_width(), config.time_width())?,
            ),
            conv_in: Conv2d::load(&w.pp("conv_in"), config.in_channels, channels[0], 3, same)?,
            down_blocks: down_blocks.collect::<crate::Result<_>>()?,
            mid_block: MidBlock::load(&w.pp("mid_block"), config)?,
            up_blocks: up_blocks.collect::<crate::Result<_>>()?,
            conv_norm_out: GroupNorm::load(
                norm,
                channels[0],
                config.norm_num_groups,
                config.norm_eps,
                Some(config.act_fn),
            )?,
            conv_out: Conv2d::load(&w.pp("conv_out"), channels[0], config.out_channels, 3, same)?,
            config: config.clone(),
            precision: w.precision(),
            checkpointing: false,
        })
    }

    /// Channels of the latents.
    pub(crate) fn in_channels(&self) -> usize {
        self.config.in_channels
    }

    /// What it computes in.
    pub(crate) fn precision(&self) -> Precision {
        self.precision
    }

    /// * `x` `[B, c, h, w]`: latents with noise
    /// * `t`: one timestep per image, `0..T`; fractions as some samplers use them
    /// * `text` `[B, L, cross width]`
    ///
    /// Gives the prediction, `[B, c, h, w]`, in the dtype of `x`, whatever it computes in. Differentiable in `x`, `text`
    /// and every trained weight.
    pub fn forward(&self, x: &Tensor, t: &[f64], text: &Tensor) -> Result<Tensor> {
        let (b, ..) = x.dims4()?;
        if t.len() != b || text.dim(0)? != b {
            candle_core::bail!("unet: {b} latents, {} timesteps, {} texts", t.len(), text.dim(0)?);
        }
        if x.device().is_cuda() {
            return ops::recorded(&[x, text], |inputs| self.pass(&inputs[0], t, &inputs[1]));
        }
        self.pass(x, t, text)
    }

    fn pass(&self, x: &Tensor, t: &[f64], text: &Tensor) -> Result<Tensor> {
        let (given, dtype) = (x.dtype(), self.precision.dtype());
        // 1. time
        let time = self.time(t, x.device())?.to_dtype(dtype)?; // [B, 4 C0]
        let time = self.config.resnet().shared_time(time)?;
        // A text that learns is rounded anew by each transformer: so its gradients meet in its own dtype.
        let text = if text.track_op() { text.clone() } else { text.to_dtype(dtype)? };
        let shared = self.shared(&time, &text)?;
        let run = Run { time: &time, text: &text, shared: &shared, checkpointing: self.checkpointing };
        // 2. down: every intermediate result is a skip
        let mut x = self.conv_in.forward(&x.to_dtype(dtype)?)?;
        let mut skips = vec![x.clone()];
        for block in &self.down_blocks {
            x = block.forward(&x, &run, &mut skips)?;
        }
        // 3. middle
        x = self.mid_block.forward(&x, &run)?;
        // 4. up
        for block in &self.up_blocks {
            x = block.forward(&x, &run, &mut skips)?;
        }
        // 5. out
        self.conv_out.forward(&self.conv_norm_out.forward(&x)?)?.to_dtype(given)
    }

    /// What layers make of `time` `[B, 4 C0]` and `text` `[B, L, cross width]`, where that is better done at once.
    fn shared(&self, time: &Tensor, text: &Tensor) -> Result<Shared> {
        let mut shared = Shared::default();
        if !time.device().is_cuda() || self.precision != Precision::Bf16 {
            return Ok(shared); // only weights in bf16 are joined
        }
        let projections: Vec<&Linear> =
            self.resnets().filter_map(|resnet| resnet.time_projection()).collect();
        if !time.track_op() && !projections.iter().any(|project| project.is_trainable()) {
            let times = Linear::forward_columns(&projections, time)?;
            shared.times = projections.iter().map(|project| project.name().to_owned()).zip(times).collect();
        }
        let keys_values: Vec<&Linear> =
            self.attentions_to_text().flat_map(|one| [&one.to_k, &one.to_v]).collect();
        if !text.track_op() && !keys_values.iter().any(|layer| layer.is_trainable()) {
            let mut results = Linear::forward_all(&keys_values, text)?.into_iter();
            for one in self.attentions_to_text() {
                let (Some(k), Some(v)) = (results.next(), results.next()) else { break };
                shared.keys_values.insert(one.to_k.name().to_owned(), [k, v]);
            }
        }
        Ok(shared)
    }

    /// All levels, the way down first.
    fn levels(&self) -> impl Iterator<Item = &Level> {
        let down = self.down_blocks.iter().map(|block| &block.level);
        down.chain(self.up_blocks.iter().map(|block| &block.level))
    }

    fn resnets(&self) -> impl Iterator<Item = &Resnet> {
        let resnets = self.levels().flat_map(|level| &level.resnets).chain(&self.mid_block.resnets);
        resnets.map(|resnet| &**resnet)
    }

    /// The attention to the text of every transformer layer.
    fn attentions_to_text(&self) -> impl Iterator<Item = &Attention> {
        let transformers =
            self.levels().flat_map(|level| &level.attentions).chain([&self.mid_block.attention]);
        transformers.flat_map(|transformer| &transformer.transformer_blocks).map(|block| &block.attn2)
    }

    /// Sinusoidal embedding of the timesteps (Vaswani et al. 2017), in f32, through two layers: `[B, 4 C0]`.
    fn time(&self, t: &[f64], device: &Device) -> Result<Tensor> {
        let (width, shift) = (self.config.block_out_channels[0], self.config.freq_shift);
        let half = width / 2;
        let step = -10_000.0_f32.ln() / (half as f32 - shift as f32);
        let mut values = Vec::with_capacity(t.len() * width);
        for &t in t {
            let angle = |i: usize| t as f32 * (step * i as f32).exp();
            let sines = (0..half).map(|i| angle(i).sin());
            let cosines = (0..half).map(|i| angle(i).cos());
            if self.config.flip_sin_to_cos {
                values.extend(cosines.chain(sines));
            } else {
                values.extend(sines.chain(cosines));
            }
            values.extend(std::iter::repeat_n(0.0, width % 2));
        }
        let x = Tensor::from_vec(values, (t.len(), width), device)?.to_dtype(DType::F32)?;
        let hidden = ops::activate(&self.time_embedding.0.forward(&x)?, self.config.act_fn)?;
        self.time_embedding.1.forward(&hidden)
    }
}

/// What every block of one forward gets.
struct Run<'a> {
    /// `[B, 4 C0]`
    time: &'a Tensor,
    /// `[B, L, cross width]`
    text: &'a Tensor,
    shared: &'a Shared,
    checkpointing: bool,
}

/// What layers all over the model make of the time or the text alone, by the name of each layer's weight: on a GPU in
/// bf16, where neither they nor the layers learn, few products for all of them. Else empty.
#[derive(Default)]
struct Shared {
    /// Of the residual blocks' time embeddings: `[B, C]`.
    times: HashMap<String, Tensor>,
    /// Of the attentions to the text, by the keys' weight: `[B, L, C]`.
    keys_values: HashMap<String, [Tensor; 2]>,
}

impl Run<'_> {
    fn resnet(&self, resnet: &Arc<Resnet>, x: &Tensor) -> Result<Tensor> {
        let known = resnet.time_projection().and_then(|project| self.shared.times.get(project.name()));
        if !self.checkpointing {
            return resnet.forward(x, Some(known.map_or(Time::Embedding(self.time), Time::Projected)));
        }
        let (resnet, is_known) = (Arc::clone(resnet), known.is_some());
        ops::checkpoint(&[x, known.unwrap_or(self.time)], move |inputs| {
            let time = if is_known { Time::Projected(&inputs[1]) } else { Time::Embedding(&inputs[1]) };
            resnet.forward(&inputs[0], Some(time))
        })
    }

    fn transformer(&self, transformer: &Arc<Transformer>, x: &Tensor) -> Result<Tensor> {
        if !self.checkpointing || !self.shared.keys_values.is_empty() {
            return transformer.forward(x, self.text, self.shared);
        }
        let transformer = Arc::clone(transformer);
        ops::checkpoint(&[x, self.text], move |inputs| {
            transformer.forward(&inputs[0], &inputs[1], &Shared::default())
        })
    }
}

/// Residual blocks of one level, each followed by a transformer where the level attends to the text.
#[derive(Clone, Debug)]
struct Level {
    resnets: Vec<Arc<Resnet>>,
    attentions: Vec<Arc<Transformer>>,
}

impl Level {
    /// `widths`: channels in and out of each residual block. `level` counts from the shallowest down.
    fn load(
        w: &Weights,
        widths: &[(usize, usize)],
        level: usize,
        attends: bool,
        config: &Config,
    ) -> crate::Result<Self> {
        let mut resnets = Vec::new();
        let mut attentions = Vec::new();
        for (j, &(n_in, n_out)) in widths.iter().enumerate() {
            resnets.push(Arc::new(Resnet::load(&w.pp("resnets").pp(j), n_in, n_out, &config.resnet())?));
            if attends {
                attentions.push(Arc::new(Transformer::load(
                    &w.pp("attentions").pp(j),
                    n_out,
                    level,
                    config,
                )?));
            }
        }
        Ok(Self { resnets, attentions })
    }

    fn forward_one(&self, j: usize, x: &Tensor, run: &Run) -> Result<Tensor> {
        let x = run.resnet(&self.resnets[j], x)?;
        match self.attentions.get(j) {
            Some(transformer) => run.transformer(transformer, &x),
            None => Ok(x),
        }
    }
}

#[derive(Clone, Debug)]
struct DownBlock {
    level: Level,
    downsampler: Option<Conv2d>,
}

impl DownBlock {
    fn load(w: &Weights, i: usize, config: &Config) -> crate::Result<Self> {
        let channels = &config.block_out_channels;
        let (n_in, n_out) = (channels[i.saturating_sub(1)], channels[i]);
        let widths: Vec<_> =
            (0..config.layers_per_block.at(i)).map(|j| (if j == 0 { n_in } else { n_out }, n_out)).collect();
        let attends = config.down_block_types[i].starts_with("CrossAttn");
        let down = || {
            Conv2d::load(&w.pp("downsamplers").pp(0).pp("conv"), n_out, n_out, 3, Conv2dSpec::padded(2, 1))
        };
        Ok(Self {
            level: Level::load(w, &widths, i, attends, config)?,
            downsampler: (i + 1 < channels.len()).then(down).transpose()?,
        })
    }

    fn forward(&self, x: &Tensor, run: &Run, skips: &mut Vec<Tensor>) -> Result<Tensor> {
        let mut x = x.clone();
        for j in 0..self.level.resnets.len() {
            x = self.level.forward_one(j, &x, run)?;
            skips.push(x.clone());
        }
        if let Some(conv) = &self.downsampler {
            x = conv.forward(&x)?;
            skips.push(x.clone());
        }
        Ok(x)
    }
}

#[derive(Clone, Debug)]
struct UpBlock {
    level: Level,
    upsampler: Option<Conv2d>,
}

impl UpBlock {
    /// The block with number `i` from the deepest up.
    fn load(w: &Weights, i: usize, config: &Config) -> crate::Result<Self> {
        let channels: Vec<usize> = config.block_out_channels.iter().rev().copied().collect();
        let (n_levels, n_out) = (channels.len(), channels[i]);
        let level = n_levels - 1 - i;
        let n_layers = config.layers_per_block.at(level) + 1;
        let from_below = channels[i.saturating_sub(1)];
        let last_skip = channels[(i + 1).min(n_levels - 1)];
        let widths: Vec<_> = (0..n_layers)
            .map(|j| {
                let skip = if j + 1 == n_layers { last_skip } else { n_out };
                (if j == 0 { from_below } else { n_out } + skip, n_out)
            })
            .collect();
        let attends = config.attends_up(i);
        let up =
            || Conv2d::load(&w.pp("upsamplers").pp(0).pp("conv"), n_out, n_out, 3, Conv2dSpec::padded(1, 1));
        Ok(Self {
            level: Level::load(w, &widths, level, attends, config)?,
            upsampler: (i + 1 < n_levels).then(up).transpose()?,
        })
    }

    fn forward(&self, x: &Tensor, run: &Run, skips: &mut Vec<Tensor>) -> Result<Tensor> {
        let mut x = x.clone();
        for j in 0..self.level.resnets.len() {
            let Some(skip) = skips.pop() else {
                candle_core::bail!("unet: the up blocks want more skip connections than the down blocks give")
            };
            x = self.level.forward_one(j, &ops::concat(&x, &skip)?, run)?;
        }
        match (&self.upsampler, skips.last()) {
            (Some(conv), Some(next)) => {
                let (_, _, h, w) = next.dims4()?;
                conv.forward(&ops::upsample_nearest(&x, (h, w))?)
            }
            _ => Ok(x),
        }
    }
}

#[derive(Clone, Debug)]
struct MidBlock {
    resnets: [Arc<Resnet>; 2],
    attention: Arc<Transformer>,
}

impl MidBlock {
    fn load(w: &Weights, config: &Config) -> crate::Result<Self> {
        let level = config.block_out_channels.len() - 1;
        let n = config.block_out_channels[level];
        let resnet = |i: usize| {
            Ok::<_, Error>(Arc::new(Resnet::load(&w.pp("resnets").pp(i), n, n, &config.resnet())?))
        };
        Ok(Self {
            resnets: [resnet(0)?, resnet(1)?],
            attention: Arc::new(Transformer::load(&w.pp("attentions").pp(0), n, level, config)?),
        })
    }

    fn forward(&self, x: &Tensor, run: &Run) -> Result<Tensor> {
        let x = run.resnet(&self.resnets[0], x)?;
        run.resnet(&self.resnets[1], &run.transformer(&self.attention, &x)?)
    }
}

/// Eps of the norm before a transformer; a constant in the reference too.
const TRANSFORMER_EPS: f64 = 1e-6;

/// Attention of the picture to itself and to the text. Ports diffusers' `Transformer2DModel`.
#[derive(Clone, Debug)]
struct Transformer {
    norm: GroupNorm,
    proj_in: Projection,
    transformer_blocks: Vec<Block>,
    proj_out: Projection,
}

impl Transformer {
    fn load(w: &Weights, n: usize, level: usize, config: &Config) -> crate::Result<Self> {
        let blocks = w.pp("transformer_blocks");
        let n_blocks = config.transformer_layers_per_block.at(level);
        Ok(Self {
            norm: GroupNorm::load(&w.pp("norm"), n, config.norm_num_groups, TRANSFORMER_EPS, None)?,
            proj_in: Projection::load(&w.pp("proj_in"), n, config.use_linear_projection)?,
            transformer_blocks: (0..n_blocks)
                .map(|i| Block::load(&blocks.pp(i), n, config.heads().at(level), config.cross_attention_dim))
                .collect::<crate::Result<_>>()?,
            proj_out: Projection::load(&w.pp("proj_out"), n, config.use_linear_projection)?,
        })
    }

    fn forward(&self, x: &Tensor, text: &Tensor, shared: &Shared) -> Result<Tensor> {
        let text = text.to_dtype(x.dtype())?;
        let mut tokens = self.proj_in.to_tokens(&self.norm.forward(x)?)?; // [B, h w, C]
        for block in &self.transformer_blocks {
            tokens = block.forward(&tokens, &text, shared)?;
        }
        self.proj_out.to_picture(x, &tokens)
    }
}

/// As many tensors as there should be.
fn all_of<const N: usize>(tensors: Vec<Tensor>) -> Result<[Tensor; N]> {
    let n = tensors.len();
    tensors.try_into().map_err(|_| candle_core::Error::msg(format!("wanted {N} results, got {n}")))
}

/// A square projection, stored as a matrix or as a 1x1 convolution. The arithmetic is the same.
#[derive(Clone, Debug)]
struct Projection {
    weight: Param,
    bias: Param,
}

impl Projection {
    fn load(w: &Weights, n: usize, linear: bool) -> crate::Result<Self> {
        let weight = if linear { w.get("weight", &[n, n])? } else { w.get("weight", &[n, n, 1, 1])? };
        Ok(Self { weight, bias: w.get("bias", &[n])? })
    }

    fn to_tokens(&self, x: &Tensor) -> Result<Tensor> {
        ops::picture_to_tokens(x, &self.weight, Some(&self.bias))
    }

    fn to_picture(&self, residual: &Tensor, tokens: &Tensor) -> Result<Tensor> {
        ops::tokens_to_picture(residual, tokens, &self.weight, Some(&self.bias))
    }
}

/// One transformer layer: self-attention, attention to the text, feed-forward, each on a residual path.
#[derive(Clone, Debug)]
struct Block {
    norm1: LayerNorm,
    attn1: Attention,
    norm2: LayerNorm,
    attn2: Attention,
    norm3: LayerNorm,
    ff: (Linear, Linear),
}

impl Block {
    fn load(w: &Weights, n: usize, n_heads: usize, text_width: usize) -> crate::Result<Self> {
        let norm = |name: &str| LayerNorm::load(&w.pp(name), n, 1e-5);
        let ff = w.pp("ff").pp("net");
        Ok(Self {
            norm1: norm("norm1")?,
            attn1: Attention::load(&w.pp("attn1"), n, n, n_heads)?,
            norm2: norm("norm2")?,
            attn2: Attention::load(&w.pp("attn2"), n, text_width, n_heads)?,
            norm3: norm("norm3")?,
            ff: (Linear::load(&ff.pp(0).pp("proj"), n, 8 * n)?, Linear::load(&ff.pp(2), 4 * n, n)?),
        })
    }

    fn forward(&self, x: &Tensor, text: &Tensor, shared: &Shared) -> Result<Tensor> {
        let normed = self.norm1.forward(x)?;
        let x = self.attn1.forward_plus(x, &normed, &normed, None)?;
        let known = shared.keys_values.get(self.attn2.to_k.name());
        let x = self.attn2.forward_plus(&x, &self.norm2.forward(&x)?, text, known)?;
        let hidden = ops::geglu(&self.ff.0.forward(&self.norm3.forward(&x)?)?)?;
        self.ff.1.forward_plus(&x, &hidden)
    }
}

#[derive(Clone, Debug)]
struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    n_heads: usize,
}

impl Attention {
    fn load(w: &Weights, n: usize, source_width: usize, n_heads: usize) -> crate::Result<Self> {
        Ok(Self {
            to_q: Linear::load_no_bias(&w.pp("to_q"), n, n)?,
            to_k: Linear::load_no_bias(&w.pp("to_k"), source_width, n)?,
            to_v: Linear::load_no_bias(&w.pp("to_v"), source_width, n)?,
            to_out: Linear::load(&w.pp("to_out").pp(0), n, n)?,
            n_heads,
        })
    }

    /// * `residual`, `x` `[B, h w, C]`, `source` `[B, S, source width]`
    /// * `known`: keys and values of `source`, where they are known
    ///
    /// Gives `residual` and the attention of `x` to `source`, added up.
    fn forward_plus(
        &self,
        residual: &Tensor,
        x: &Tensor,
        source: &Tensor,
        known: Option<&[Tensor; 2]>,
    ) -> Result<Tensor> {
        let [q, k, v] = match known {
            Some([k, v]) => [self.to_q.forward(x)?, k.clone(), v.clone()],
            None if x.id() == source.id() => {
                all_of(Linear::forward_all(&[&self.to_q, &self.to_k, &self.to_v], x)?)?
            }
            None => {
                let [k, v] = all_of(Linear::forward_all(&[&self.to_k, &self.to_v], source)?)?;
                [self.to_q.forward(x)?, k, v]
            }
        };
        let attended = ops::attention(&q, &k, &v, self.n_heads, false)?;
        drop((q, k, v));
        self.to_out.forward_plus(residual, &attended)
    }
}
