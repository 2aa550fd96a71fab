//! TRACER (Lee, Shin and Han 2022, arXiv 2112.07380): segments a picture: how much of each pixel is foreground.
//! Inference only.
//!
//! Ports the form that CarveKit's weights are for, `TracerUniversalB7` of carvekit 4.1.2: the encoder without the
//! frequency edge module of the paper. Sizes come from the config, so that a small segmenter is the same code. Dilated
//! and one-sided kernels are spread into dense square ones when they are loaded: for these few layers zeros cost less
//! than an operation of their own.

use candle_core::{Result, Tensor};
use serde::Deserialize;

use super::efficientnet::{self, EfficientNet, Padding, WeightNames};
use super::refuse;
use crate::nn::{BatchNorm, NormedConv2d, sigmoid};
use crate::ops::{self, Conv2dSpec, upsample_bilinear};
use crate::param::Param;
use crate::weights::Weights;

/// Eps of the encoder's norms, TensorFlow's, and of all others, torch's.
const ENCODER_EPS: f64 = 1e-3;
const EPS: f64 = 1e-5;

/// Share of channels that the union attention sets to zero.
const CONFIDENCE_RATIO: f64 = 0.1;
/// Certain background: beyond it nothing is an edge.
const DENOISE: f64 = 0.93;

/// `segmenter/config.json`.
#[derive(Clone, Debug, Deserialize)]
pub struct Config {
    /// Of the encoder: 2 in B7.
    pub(crate) width_coefficient: f64,
    /// Of the encoder: 3.1 in B7.
    pub(crate) depth_coefficient: f64,
    /// Side of the pictures that the encoder's padding was made for: 600 in B7.
    pub image_size: usize,
    /// Side that pictures are brought to: 640 in B7. A multiple of 32.
    pub input_size: usize,
    /// Channels of the three receptive field blocks, from stride 8 down: 32, 64, 128 in B7.
    pub(crate) rfb_channels: [usize; 3],
}

impl Config {
    /// Refuses what is no network.
    pub(crate) fn check(&self) -> crate::Result<()> {
        self.encoder().check()?;
        let side = self.input_size;
        refuse(
            side > 0 && side.is_multiple_of(32) && side <= 4096,
            "input_size",
            side,
            "a multiple of 32 up to 4096",
        )?;
        refuse(
            self.rfb_channels.iter().all(|&n| n > 0),
            "rfb_channels",
            self.rfb_channels,
            "one channel at least",
        )
    }

    pub(crate) fn encoder(&self) -> efficientnet::Config {
        efficientnet::Config {
            width_coefficient: self.width_coefficient,
            depth_coefficient: self.depth_coefficient,
            padding: Padding::StaticSame,
            image_size: Some(self.image_size),
            batch_norm_eps: ENCODER_EPS,
        }
    }
}

/// The segmenter.
#[derive(Debug)]
pub struct Tracer {
    encoder: EfficientNet,
    rfb: [ReceptiveField; 3],
    aggregation: Aggregation,
    attention2: ObjectAttention,
    attention1: ObjectAttention,
    input_size: usize,
}

impl Tracer {
    /// From weights named as CarveKit names them.
    pub fn load(w: &Weights, config: &Config) -> crate::Result<Self> {
        config.check()?;
        let encoder = config.encoder();
        let ([_, at4, at8, at16, at32], [a, b, c]) = (encoder.channels(), config.rfb_channels);
        Ok(Self {
            encoder: EfficientNet::load(&w.pp("encoder"), &encoder, WeightNames::Lukemelas)?,
            rfb: [
                ReceptiveField::load(&w.pp("rfb2"), at8, a)?,
                ReceptiveField::load(&w.pp("rfb3"), at16, b)?,
                ReceptiveField::load(&w.pp("rfb4"), at32, c)?,
            ],
            aggregation: Aggregation::load(&w.pp("agg"), config.rfb_channels)?,
            attention2: ObjectAttention::load(&w.pp("ObjectAttention2"), at8)?,
            attention1: ObjectAttention::load(&w.pp("ObjectAttention1"), at4)?,
            input_size: config.input_size,
        })
    }

    /// Side of the pictures it takes.
    pub(crate) fn input_size(&self) -> usize {
        self.input_size
    }

    /// Normalised pictures `[B, 3, S, S]`, S being `Tracer::input_size`, to foreground `[B, 1, S, S]` in 0..1.
    pub fn forward(&self, pictures: &Tensor) -> Result<Tensor> {
        let features = self.encoder.features(pictures)?;
        let [_, at4, at8, at16, at32] = &features[..] else {
            candle_core::bail!("tracer: wanted five features, got {}", features.len())
        };
        let rfb = [self.rfb[0].forward(at8)?, self.rfb[1].forward(at16)?, self.rfb[2].forward(at32)?];
        let coarse = self.aggregation.forward(&rfb)?; // [B, 1, S/8, S/8]
        let middle = self.attention2.forward(&coarse, at8)?;
        let fine = self.attention1.forward(&upsample_bilinear(&middle, 2, false)?, at4)?; // [B, 1, S/4, S/4]
        let sum = ((upsample_bilinear(&coarse, 8, false)? + upsample_bilinear(&middle, 8, false)?)?
            + upsample_bilinear(&fine, 4, false)?)?;
        sigmoid(&(sum / 3.0)?)
    }
}

/// Klambauer et al. 2017, arXiv 1706.02515.
fn selu(x: &Tensor) -> Result<Tensor> {
    x.elu(1.673_263_242_354_377_2)? * 1.050_700_987_355_480_5
}

/// A convolution that keeps the size, its norm, and SELU.
#[derive(Debug)]
struct BasicConv(NormedConv2d);

impl BasicConv {
    /// Square, of one group, as `conv` and `bn`.
    fn load(w: &Weights, n_in: usize, n_out: usize, kernel: usize) -> crate::Result<Self> {
        Self::spread(w, ("conv", "bn"), [n_out, n_in, kernel, kernel], 1, false)
    }

    /// With a kernel `[O, C, kh, kw]` whose taps lie `dilation` apart.
    fn spread(
        w: &Weights,
        (conv, norm): (&str, &str),
        shape: [usize; 4],
        dilation: usize,
        depthwise: bool,
    ) -> crate::Result<Self> {
        let kernel = w.pp(conv).get("weight", &shape)?;
        let norm = BatchNorm::load(&w.pp(norm), shape[0], EPS)?;
        let dense = spread(&kernel, dilation)?;
        let spec = Conv2dSpec::padded(1, dense.dim(2)? / 2);
        Ok(Self(NormedConv2d::of(&kernel, &dense, &norm, spec, depthwise)?))
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        selu(&self.0.forward(x)?)
    }
}

/// The dense square kernel that does what one with taps `dilation` apart does.
fn spread(kernel: &Param, dilation: usize) -> crate::Result<Tensor> {
    let value = kernel.value();
    let (o, c, kh, kw) = value.dims4()?;
    let [high, wide] = [kh, kw].map(|k| dilation * (k - 1) + 1);
    let side = high.max(wide);
    if side == kh && side == kw {
        return Ok(value);
    }
    let (top, left) = ((side - high) / 2, (side - wide) / 2);
    let taps = value.flatten_all()?.to_vec1::<f32>()?;
    let mut dense = vec![0.0; o * c * side * side];
    for (i, &tap) in taps.iter().enumerate() {
        let (plane, y, x) = (i / (kh * kw), i / kw % kh, i % kw);
        dense[(plane * side + top + y * dilation) * side + left + x * dilation] = tap;
    }
    Ok(Tensor::from_vec(dense, (o, c, side, side), value.device())?)
}

/// Four looks of growing reach at one feature.
#[derive(Debug)]
struct ReceptiveField {
    branches: [Vec<BasicConv>; 4],
    conv_cat: BasicConv,
    conv_res: BasicConv,
}

impl ReceptiveField {
    fn load(w: &Weights, n_in: usize, n: usize) -> crate::Result<Self> {
        // Branch 0 is a 1x1 convolution; the others go on 1 x k, k x 1, and 3 x 3 with taps k apart.
        let branch = |i: usize| -> crate::Result<Vec<BasicConv>> {
            let (w, k) = (w.pp(format!("branch{i}")), 2 * i + 1);
            let mut convs = vec![BasicConv::load(&w.pp(0), n_in, n, 1)?];
            if i > 0 {
                let names = ("conv", "bn");
                convs.push(BasicConv::spread(&w.pp(1), names, [n, n, 1, k], 1, false)?);
                convs.push(BasicConv::spread(&w.pp(2), names, [n, n, k, 1], 1, false)?);
                convs.push(BasicConv::spread(&w.pp(3), names, [n, n, 3, 3], k, false)?);
            }
            Ok(convs)
        };
        Ok(Self {
            branches: [branch(0)?, branch(1)?, branch(2)?, branch(3)?],
            conv_cat: BasicConv::load(&w.pp("conv_cat"), 4 * n, n, 3)?,
            conv_res: BasicConv::load(&w.pp("conv_res"), n_in, n, 1)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let branch = |convs: &Vec<BasicConv>| convs.iter().try_fold(x.clone(), |x, conv| conv.forward(&x));
        let all = self.branches.iter().map(branch).collect::<Result<Vec<_>>>()?;
        (self.conv_cat.forward(&Tensor::cat(&all, 1)?)? + self.conv_res.forward(x)?)?.relu()
    }
}

/// The three levels brought together at stride 8.
#[derive(Debug)]
struct Aggregation {
    upsample: [BasicConv; 5],
    concat2: BasicConv,
    concat3: BasicConv,
    union: UnionAttention,
}

impl Aggregation {
    fn load(w: &Weights, [a, b, c]: [usize; 3]) -> crate::Result<Self> {
        let up = |i: usize, n_in: usize, n_out: usize| {
            BasicConv::load(&w.pp(format!("conv_upsample{i}")), n_in, n_out, 3)
        };
        Ok(Self {
            upsample: [up(1, c, b)?, up(2, c, a)?, up(3, b, a)?, up(4, c, c)?, up(5, b + c, b + c)?],
            concat2: BasicConv::load(&w.pp("conv_concat2"), b + c, b + c, 3)?,
            concat3: BasicConv::load(&w.pp("conv_concat3"), a + b + c, a + b + c, 3)?,
            union: UnionAttention::load(&w.pp("UAM"), a + b + c)?,
        })
    }

    fn forward(&self, [e2, e3, e4]: &[Tensor; 3]) -> Result<Tensor> {
        let twice = |x: &Tensor| upsample_bilinear(x, 2, true);
        let [up1, up2, up3, up4, up5] = &self.upsample;
        let e4_up = twice(e4)?;
        let e3_1 = (up1.forward(&e4_up)? * e3)?;
        let e2_1 = ((up2.forward(&twice(&e4_up)?)? * up3.forward(&twice(e3)?)?)? * e2)?;
        let e3_2 = self.concat2.forward(&Tensor::cat(&[e3_1, up4.forward(&e4_up)?], 1)?)?;
        let e2_2 = Tensor::cat(&[e2_1, up5.forward(&twice(&e3_2)?)?], 1)?;
        self.union.forward(&self.concat3.forward(&e2_2)?)
    }
}

/// Channels that matter, then places that matter: `[B, C, h, w]` to one map `[B, 1, h, w]`.
#[derive(Debug)]
struct UnionAttention {
    norm: BatchNorm,
    bn: BatchNorm,
    channel: [Param; 3],
    fc: Param,
    spatial: [Param; 3],
}

impl UnionAttention {
    fn load(w: &Weights, n: usize) -> crate::Result<Self> {
        let matrix = |name: &str, n_out: usize| w.pp(name).get("weight", &[n_out, n]);
        Ok(Self {
            norm: BatchNorm::load(&w.pp("norm").pp(0), n, EPS)?,
            bn: BatchNorm::load(&w.pp("bn"), n, EPS)?,
            channel: [matrix("channel_q", n)?, matrix("channel_k", n)?, matrix("channel_v", n)?],
            fc: matrix("fc", n)?,
            spatial: [matrix("spatial_q", 1)?, matrix("spatial_k", 1)?, matrix("spatial_v", 1)?],
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, c, h, w) = x.dims4()?;
        // 1. How much each channel matters.
        let mean = x.flatten_from(2)?.mean(2)?.reshape((b, c, 1, 1))?;
        let mean = self.norm.forward(&mean)?.reshape((b, c))?;
        let [q, k, v] = project(&self.channel, &mean)?;
        let scores = q.unsqueeze(2)?.broadcast_mul(&k.unsqueeze(1)?)?; // [B, C, C]
        let mixed = ops::softmax(&scores)?.broadcast_mul(&v.unsqueeze(1)?)?.sum(2)?;
        let weights = sigmoid(&ops::linear(&mixed, &self.fc, None)?)?; // [B, C]
        let x = (x.broadcast_mul(&weights.reshape((b, c, 1, 1))?)? + x)?;
        // 2. The least of them leave.
        let kept = without_the_least(&weights, CONFIDENCE_RATIO)?.reshape((b, c, 1, 1))?;
        let x = self.bn.forward(&x)?.broadcast_mul(&kept)?;
        // 3. How much each place matters, row against row.
        let places = x.permute((0, 2, 3, 1))?.contiguous()?; // [B, h, w, C]
        let [q, k, v] = project(&self.spatial, &places)?;
        let [q, k, v] = [q.reshape((b, h, w))?, k.reshape((b, h, w))?, v.reshape((b, h, w))?];
        let unscaled = (q * (w as f64).sqrt())?; // the reference does not divide by the root of the width
        (ops::attention(&unscaled, &k, &v, 1, false)? + v)?.unsqueeze(1)
    }
}

fn project([q, k, v]: &[Param; 3], x: &Tensor) -> Result<[Tensor; 3]> {
    Ok([ops::linear(x, q, None)?, ops::linear(x, k, None)?, ops::linear(x, v, None)?])
}

/// `[B, C]` with zeros where a row is at most its own `share` quantile, between neighbours by the straight line.
fn without_the_least(weights: &Tensor, share: f64) -> Result<Tensor> {
    let mut rows = weights.to_vec2::<f32>()?;
    for row in &mut rows {
        let mut sorted = row.clone();
        sorted.sort_unstable_by(f32::total_cmp);
        let place = share * (sorted.len() - 1) as f64;
        let (low, high) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
        let threshold = low + (high - low) * (place - place.floor()) as f32;
        row.iter_mut().filter(|v| **v <= threshold).for_each(|v| *v = 0.0);
    }
    Tensor::new(rows, weights.device())
}

/// Object and edge of a coarse map, sharpened by a finer feature.
#[derive(Debug)]
struct ObjectAttention {
    depthwise: BasicConv,
    pointwise: BasicConv,
    looks: [(BasicConv, BasicConv); 4],
    conv1: BasicConv,
}

impl ObjectAttention {
    fn load(w: &Weights, n: usize) -> crate::Result<Self> {
        let (half, first) = (n / 2, w.pp("DWSConv"));
        let look = |i: usize, kernel: usize, dilation: usize| {
            let w = w.pp(format!("DWConv{i}"));
            let wide =
                BasicConv::spread(&w.pp(0), ("DWConv", "bn"), [half, 1, kernel, kernel], dilation, true)?;
            Ok::<_, crate::Error>((wide, BasicConv::load(&w.pp(1), half, n / 8, 1)?))
        };
        Ok(Self {
            depthwise: BasicConv::spread(&first, ("DWConv", "bn"), [n, 1, 3, 3], 1, true)?,
            pointwise: BasicConv::spread(&first, ("PWConv", "bn2"), [half, n, 1, 1], 1, false)?,
            looks: [look(1, 1, 1)?, look(2, 3, 1)?, look(3, 3, 3)?, look(4, 3, 5)?],
            conv1: BasicConv::load(&w.pp("conv1"), half, 1, 1)?,
        })
    }

    /// `map` `[B, 1, h, w]` and `feature` `[B, C, h, w]` to a map.
    fn forward(&self, map: &Tensor, feature: &Tensor) -> Result<Tensor> {
        let object = sigmoid(map)?;
        let background = (1.0 - &object)?;
        let uncertain = background.le(DENOISE)?.to_dtype(background.dtype())?;
        let edge = (background * uncertain)?;
        let x = (feature.broadcast_mul(&object)? + feature.broadcast_mul(&edge)?)?;
        let x = self.pointwise.forward(&self.depthwise.forward(&x)?)?;
        let looks = self.looks.iter().map(|(wide, narrow)| narrow.forward(&wide.forward(&x)?));
        let x = (Tensor::cat(&looks.collect::<Result<Vec<_>>>()?, 1)? + x)?;
        self.conv1.forward(&x)?.relu()? + map
    }
}
