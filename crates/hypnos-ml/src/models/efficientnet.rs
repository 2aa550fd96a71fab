//! EfficientNet (Tan and Le 2019, arXiv 1905.11946): pictures to features at five strides. Frozen; gradients go through
//! it to the picture.
//!
//! One network in two spellings: timm's (`efficientnet_b1`, the perceptual loss's) and that of lukemelas'
//! EfficientNet-PyTorch (TRACER's encoder). Batch norms have fixed statistics and are folded into the convolutions
//! before them. Two conventions of padding are in use and are a setting of the file, since weights learned with one see
//! a grid shifted by a pixel under the other.

use candle_core::{Result, Tensor};
use serde::Deserialize;

use super::refuse;
use crate::nn::{NormedConv2d, sigmoid};
use crate::ops::{self, Activation, Conv2dSpec};
use crate::param::Param;
use crate::weights::Weights;

mod dry;

/// Channels, repeats, kernel, stride and expansion of each stage of B0, table 1 of the paper.
const STAGES: [Stage; 7] = [
    Stage { channels: 16, repeats: 1, kernel: 3, stride: 1, expansion: 1 },
    Stage { channels: 24, repeats: 2, kernel: 3, stride: 2, expansion: 6 },
    Stage { channels: 40, repeats: 2, kernel: 5, stride: 2, expansion: 6 },
    Stage { channels: 80, repeats: 3, kernel: 3, stride: 2, expansion: 6 },
    Stage { channels: 112, repeats: 3, kernel: 5, stride: 1, expansion: 6 },
    Stage { channels: 192, repeats: 4, kernel: 5, stride: 2, expansion: 6 },
    Stage { channels: 320, repeats: 1, kernel: 3, stride: 1, expansion: 6 },
];

/// The stages after which features are taken: the last ones of strides 2, 4, 8, 16 and 32.
const TAPS: [usize; 5] = [0, 1, 2, 4, 6];

/// Channels of the stem of B0.
const STEM: usize = 32;

struct Stage {
    channels: usize,
    repeats: usize,
    kernel: usize,
    stride: usize,
    expansion: usize,
}

/// Sizes and conventions.
#[derive(Clone, Debug, Deserialize)]
pub struct Config {
    /// What channels are multiplied with: 1 in B1, 2 in B7.
    pub(crate) width_coefficient: f64,
    /// What repeats are multiplied with: 1.1 in B1, 3.1 in B7.
    pub(crate) depth_coefficient: f64,
    /// How convolutions are padded.
    #[serde(default)]
    pub(crate) padding: Padding,
    /// Side of the pictures that static padding was computed for.
    pub image_size: Option<usize>,
    /// Eps of every batch norm.
    #[serde(default = "eps")]
    pub(crate) batch_norm_eps: f64,
}

fn eps() -> f64 {
    1e-5
}

/// How convolutions are padded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Padding {
    /// Half of the kernel on every side: torch's.
    #[default]
    Symmetric,
    /// TensorFlow's "same" for pictures of `image_size`, whatever size they have: lukemelas'.
    StaticSame,
}

/// How a file names the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightNames {
    /// `conv_stem`, `blocks.1.0.conv_dw`.
    Timm,
    /// `_conv_stem`, `_blocks.1._depthwise_conv`.
    Lukemelas,
}

impl Config {
    /// Refuses what is no network.
    pub(crate) fn check(&self) -> crate::Result<()> {
        let sane = |c: f64| c > 0.0 && c <= 8.0;
        refuse(
            sane(self.width_coefficient),
            "width_coefficient",
            self.width_coefficient,
            "above 0 and at most 8",
        )?;
        refuse(
            sane(self.depth_coefficient),
            "depth_coefficient",
            self.depth_coefficient,
            "above 0 and at most 8",
        )?;
        refuse(self.batch_norm_eps > 0.0, "batch_norm_eps", self.batch_norm_eps, "a number above zero")?;
        let sized = self.padding == Padding::Symmetric || self.image_size.is_some_and(|side| side > 0);
        refuse(sized, "image_size", self.image_size, "a size, for static-same padding")
    }

    /// Channels of the five features.
    pub(crate) fn channels(&self) -> [usize; 5] {
        TAPS.map(|tap| self.round(STAGES[tap].channels))
    }

    /// The reference's `round_filters`: to multiples of 8, never down by more than a tenth.
    fn round(&self, channels: usize) -> usize {
        let wished = channels as f64 * self.width_coefficient;
        let rounded = ((wished + 4.0) as usize / 8 * 8).max(8);
        if (rounded as f64) < 0.9 * wished { rounded + 8 } else { rounded }
    }

    fn repeats(&self, repeats: usize) -> usize {
        (repeats as f64 * self.depth_coefficient).ceil() as usize
    }
}

/// The size that pictures are thought to have on their way, for static padding.
struct Size {
    padding: Padding,
    side: usize,
}

impl Size {
    /// Padding of the next convolution; the size is then what comes out of it.
    fn pass(&mut self, kernel: usize, stride: usize) -> Conv2dSpec {
        if self.padding == Padding::Symmetric {
            return Conv2dSpec::padded(stride, kernel / 2);
        }
        let out = self.side.div_ceil(stride);
        let whole = ((out - 1) * stride + kernel).saturating_sub(self.side);
        self.side = out;
        Conv2dSpec { stride, before: whole / 2, after: whole - whole / 2 }
    }
}

/// The network, without its classifier.
#[derive(Debug)]
pub struct EfficientNet {
    stem: NormedConv2d,
    /// Block by block, and whether a feature is taken after it.
    blocks: Vec<(Block, bool)>,
}

impl EfficientNet {
    /// From weights under these names.
    pub fn load(w: &Weights, config: &Config, names: WeightNames) -> crate::Result<Self> {
        config.check()?;
        let mut size = Size { padding: config.padding, side: config.image_size.unwrap_or(0) };
        let eps = config.batch_norm_eps;
        let (conv, norm) = match names {
            WeightNames::Timm => ("conv_stem", "bn1"),
            WeightNames::Lukemelas => ("_conv_stem", "_bn0"),
        };
        let mut n_in = config.round(STEM);
        let stem = NormedConv2d::load(w, (conv, norm), [n_in, 3, 3, 3], size.pass(3, 2), eps)?;
        let mut blocks = Vec::new();
        for (i, stage) in STAGES.iter().enumerate() {
            let repeats = config.repeats(stage.repeats);
            for j in 0..repeats {
                let w = match names {
                    WeightNames::Timm => w.pp("blocks").pp(i).pp(j),
                    WeightNames::Lukemelas => w.pp("_blocks").pp(blocks.len()),
                };
                let (n_out, stride) = (config.round(stage.channels), if j == 0 { stage.stride } else { 1 });
                let depthwise = size.pass(stage.kernel, stride);
                // lukemelas' code compares a list with a number here, so that no stage's first block is residual.
                let is_residual = stride == 1 && n_in == n_out && (j > 0 || names == WeightNames::Timm);
                let (expansion, kernel) = (stage.expansion, stage.kernel);
                let shape = BlockShape { n_in, n_out, expansion, kernel, depthwise, is_residual };
                blocks.push((Block::load(&w, &shape, names, eps)?, j + 1 == repeats && TAPS.contains(&i)));
                n_in = n_out;
            }
        }
        Ok(Self { stem, blocks })
    }

    /// Normalised pictures `[B, 3, H, W]` to features at strides 2, 4, 8, 16 and 32, each `[B, C, H/s, W/s]` with
    /// `Config::channels`. Differentiable in the pictures.
    pub fn features(&self, pictures: &Tensor) -> Result<Vec<Tensor>> {
        let mut x = silu(&self.stem.forward(pictures)?)?;
        let mut features = Vec::with_capacity(TAPS.len());
        for (block, is_tap) in &self.blocks {
            x = block.forward(&x)?;
            if *is_tap {
                features.push(x.clone());
            }
        }
        Ok(features)
    }
}

fn silu(x: &Tensor) -> Result<Tensor> {
    ops::activate(x, Activation::Silu)
}

struct BlockShape {
    n_in: usize,
    n_out: usize,
    expansion: usize,
    kernel: usize,
    depthwise: Conv2dSpec,
    is_residual: bool,
}

/// Inverted residual with squeeze and excitation (Sandler et al. 2018, arXiv 1801.04381; Hu et al. 2018, arXiv
/// 1709.01507).
#[derive(Debug)]
struct Block {
    expand: Option<NormedConv2d>,
    depthwise: NormedConv2d,
    reduce: [Param; 2],
    excite: [Param; 2],
    project: NormedConv2d,
    is_residual: bool,
}

impl Block {
    fn load(w: &Weights, shape: &BlockShape, names: WeightNames, eps: f64) -> crate::Result<Self> {
        let BlockShape { n_in, n_out, expansion, kernel, depthwise, is_residual } = *shape;
        let (wide, narrow) = (n_in * expansion, (n_in / 4).max(1));
        // timm calls the last convolution by another name where there is no first one.
        let (expand, middle, squeeze, project) = match (names, expansion) {
            (WeightNames::Timm, 1) => {
                (("", ""), ("conv_dw", "bn1"), ("se.conv_reduce", "se.conv_expand"), ("conv_pw", "bn2"))
            }
            (WeightNames::Timm, _) => {
                let names = (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3"));
                (names.0, names.1, ("se.conv_reduce", "se.conv_expand"), names.2)
            }
            (WeightNames::Lukemelas, _) => {
                let names =
                    (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2"));
                (names.0, names.1, ("_se_reduce", "_se_expand"), names.2)
            }
        };
        let pointwise = Conv2dSpec::padded(1, 0);
        let matrix = |name: &str, n_out: usize, n_in: usize| {
            let w = w.pp(name);
            Ok::<_, crate::Error>([w.get("weight", &[n_out, n_in])?, w.get("bias", &[n_out])?])
        };
        Ok(Self {
            expand: (expansion > 1)
                .then(|| NormedConv2d::load(w, expand, [wide, n_in, 1, 1], pointwise, eps))
                .transpose()?,
            depthwise: NormedConv2d::load_depthwise(w, middle, (wide, kernel), depthwise, eps)?,
            reduce: matrix(squeeze.0, narrow, wide)?,
            excite: matrix(squeeze.1, wide, narrow)?,
            project: NormedConv2d::load(w, project, [n_out, wide, 1, 1], pointwise, eps)?,
            is_residual,
        })
    }

    fn forward(&self, input: &Tensor) -> Result<Tensor> {
        let x = match &self.expand {
            Some(conv) => silu(&conv.forward(input)?)?,
            None => input.clone(),
        };
        let x = silu(&self.depthwise.forward(&x)?)?;
        let (b, c, _, _) = x.dims4()?;
        let squeezed = x.flatten_from(2)?.mean(2)?; // [B, C]
        let squeezed = silu(&ops::linear(&squeezed, &self.reduce[0], Some(&self.reduce[1]))?)?;
        let weights = sigmoid(&ops::linear(&squeezed, &self.excite[0], Some(&self.excite[1]))?)?;
        let x = self.project.forward(&x.broadcast_mul(&weights.reshape((b, c, 1, 1))?)?)?;
        if self.is_residual { x + input } else { Ok(x) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(width_coefficient: f64, depth_coefficient: f64) -> Config {
        Config {
            width_coefficient,
            depth_coefficient,
            padding: Padding::StaticSame,
            image_size: Some(600),
            batch_norm_eps: 1e-3,
        }
    }

    #[test]
    fn b1_and_b7_have_the_published_widths_and_depths() {
        assert_eq!(config(1.0, 1.1).channels(), [16, 24, 40, 112, 320]);
        assert_eq!(config(2.0, 3.1).channels(), [32, 48, 80, 224, 640]);
        assert_eq!(STAGES.map(|stage| config(2.0, 3.1).repeats(stage.repeats)), [4, 7, 7, 10, 10, 13, 4]);
    }

    /// What a picture of 640 would want at the fourth stage is (0, 1); the file was made for 600.
    #[test]
    fn static_padding_is_that_of_the_size_it_was_made_for() {
        let mut size = Size { padding: Padding::StaticSame, side: 600 };
        let sides = [(3, 2), (3, 1), (3, 2), (5, 2), (3, 2), (5, 1), (5, 2)].map(|(kernel, stride)| {
            let spec = size.pass(kernel, stride);
            (spec.before, spec.after)
        });
        assert_eq!(sides, [(0, 1), (1, 1), (0, 1), (1, 2), (1, 1), (2, 2), (1, 2)]);
    }
}
