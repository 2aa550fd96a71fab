//! Two-dimensional convolution: 1x1 as a matrix product, others as products with unfolded patches (im2col).
//!
//! Patches are unfolded in tiles that stay in cache, over the images of a batch together where the pictures are small,
//! so that the large weights of the deep levels are read once a batch.

use candle_core::{DType, Device, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::cpu::{Into, Mat, Threads, Tiles, View, gemm, product, sum, zeros};
use super::custom_op::{Computed, custom_op, trained_tag};
use crate::dry_run::{Cost, DryTensor, gradient_bytes};
use crate::param::Param;

/// Stride and zero padding of a convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Conv2dSpec {
    /// Step between outputs, the same in both directions.
    pub stride: usize,
    /// Zeros at the top and left.
    pub before: usize,
    /// Zeros at the bottom and right.
    pub after: usize,
}

impl Conv2dSpec {
    /// Equal padding on all four sides.
    pub fn padded(stride: usize, padding: usize) -> Self {
        Self { stride, before: padding, after: padding }
    }

    /// The size of the output along one direction.
    pub(super) fn out(&self, size: usize, kernel: usize) -> Option<usize> {
        let padded = (size + self.before + self.after).checked_sub(kernel)?;
        Some(padded / self.stride.max(1) + 1)
    }
}

/// Convolution (cross-correlation, as every framework has it) of one group.
///
/// * `x` `[B, C, H, W]`
/// * `weight` `[O, C, kh, kw]`; `bias` `[O]`
///
/// Gives `[B, O, H', W']`. Differentiable in `x`, `weight` and `bias`.
pub fn conv2d(x: &Tensor, weight: &Param, bias: Option<&Param>, spec: Conv2dSpec) -> Result<Tensor> {
    convolve(x, weight, bias, spec, None)
}

/// `residual + conv2d(x, weight, bias, spec)`, see [`conv2d()`]. `residual` `[B, O, H', W']` must have the dtype of
/// `x`.
///
/// Differentiable in `residual`, `x`, `weight` and `bias`. A GPU adds `residual` in the call of cuDNN where there is a
/// bias and cuDNN can, or else to the stored result. Errors if `residual` has another shape.
pub fn conv2d_plus(
    residual: &Tensor,
    x: &Tensor,
    weight: &Param,
    bias: Option<&Param>,
    spec: Conv2dSpec,
) -> Result<Tensor> {
    if !x.device().is_cuda() {
        return residual + conv2d(x, weight, bias, spec)?;
    }
    convolve(x, weight, bias, spec, Some(residual))
}

/// `more` on a GPU only.
fn convolve(
    x: &Tensor,
    weight: &Param,
    bias: Option<&Param>,
    spec: Conv2dSpec,
    more: Option<&Tensor>,
) -> Result<Tensor> {
    let (x, more) = (x.contiguous()?, more.map(Tensor::contiguous).transpose()?);
    let conv = Conv::new(x.dims(), weight, spec)?;
    let shape = Shape::from(conv.out_dims());
    if let Some(more) = more.as_ref().filter(|more| more.shape() != &shape) {
        bail!("{}: wanted {shape:?} to add, got {:?}", weight.name(), more.dims());
    }
    let value = match x.device() {
        Device::Cpu => Computed::cpu(conv.forward(&x, weight, bias)?, shape),
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => super::cuda::conv2d(&x, weight, bias, more.as_ref(), &conv)?,
        other => bail!("conv2d: no kernel for {other:?}"),
    };
    let (weight, bias, input) = (weight.clone(), bias.cloned(), x.clone());
    let tag = trained_tag(&weight, bias.as_ref());
    let adds = more.as_ref().is_some_and(Tensor::track_op);
    let inputs: Vec<&Tensor> = [&x, &tag].into_iter().chain(&more).collect();
    custom_op("conv2d", &inputs, value, move |dy| {
        let dx = match dy.device() {
            Device::Cpu => conv.backward(&input, dy, &weight, bias.as_ref())?,
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => super::cuda::conv2d_backward(&input, dy, &weight, bias.as_ref(), &conv)?,
            other => bail!("conv2d: no kernel for {other:?}"),
        };
        Ok([dx, None, adds.then(|| dy.clone())])
    })
}

/// [`conv2d()`] in a dry run. Its input is kept; forward and backward unfold tiles of it, and gather tiles over several
/// pictures. The scratch memory that cuDNN chooses instead is not counted here; in bf16 the weight's gradient is
/// computed from the patches of one picture at a time.
pub(crate) fn dry(
    x: &DryTensor,
    weight: &Param,
    bias: Option<&Param>,
    spec: Conv2dSpec,
) -> Result<DryTensor> {
    convolve_dry(x, weight, bias, spec, None)
}

/// [`conv2d_plus()`] in a dry run.
pub(crate) fn dry_plus(
    residual: &DryTensor,
    x: &DryTensor,
    weight: &Param,
    bias: Option<&Param>,
    spec: Conv2dSpec,
) -> Result<DryTensor> {
    if !x.meter().on_gpu() {
        return Ok(residual.plus(&dry(x, weight, bias, spec)?));
    }
    convolve_dry(x, weight, bias, spec, Some(residual))
}

fn convolve_dry(
    x: &DryTensor,
    weight: &Param,
    bias: Option<&Param>,
    spec: Conv2dSpec,
    more: Option<&DryTensor>,
) -> Result<DryTensor> {
    let (x, more) = (x.contiguous(), more.map(DryTensor::contiguous));
    let conv = Conv::new(x.dims(), weight, spec)?;
    let (b, o, oh, ow) = conv.out_dims();
    let flops = 2.0 * (b * o * conv.spatial()) as f64 * conv.patch() as f64;
    let gradients = gradient_bytes([Some(weight), bias].into_iter().flatten());
    let scratch = if x.meter().on_gpu() { 0 } else { conv.scratch() };
    let unfolds = x.dtype() == DType::BF16 && weight.is_trainable() && !conv.is_pointwise();
    let patches = if unfolds { x.dtype().size_in_bytes() * conv.patch() * conv.spatial() } else { 0 };
    let cost = Cost {
        flops,
        input_flops: flops,
        weight_flops: flops,
        is_convolution: !conv.is_pointwise(),
        scratch,
        backward_scratch: scratch + patches as u64,
        gradients,
    };
    let inputs: Vec<&DryTensor> = [&x].into_iter().chain(&more).collect();
    Ok(x.custom(&inputs, &[b, o, oh, ow], cost))
}

/// Sizes of one convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Conv {
    pub(crate) b: usize,
    pub(crate) c: usize,
    pub(crate) h: usize,
    pub(crate) w: usize,
    pub(crate) o: usize,
    pub(crate) kh: usize,
    pub(crate) kw: usize,
    pub(crate) oh: usize,
    pub(crate) ow: usize,
    pub(crate) spec: Conv2dSpec,
}

/// Elements of one tile of unfolded patches: 4 MB of f32, within the shared cache.
const TILE_ELEMENTS: usize = 1 << 20;

/// Outputs `start..end`, counted over the batch, whose patches are unfolded together.
#[derive(Clone, Copy)]
struct Tile {
    start: usize,
    end: usize,
}

impl Tile {
    fn len(self) -> usize {
        self.end - self.start
    }
}

impl Conv {
    fn new(x: &[usize], weight: &Param, spec: Conv2dSpec) -> Result<Self> {
        let dims = weight.dims();
        let (&[b, c, h, w], &[o, c_w, kh, kw]) = (x, &dims[..]) else {
            bail!("{}: wanted a weight [O, C, kh, kw], got {dims:?} for inputs {x:?}", weight.name());
        };
        match (spec.out(h, kh), spec.out(w, kw)) {
            (Some(oh), Some(ow)) if c == c_w && spec.stride > 0 => {
                Ok(Self { b, c, h, w, o, kh, kw, oh, ow, spec })
            }
            _ => bail!("{}: {dims:?} does not fit inputs {x:?}", weight.name()),
        }
    }

    pub(super) fn out_dims(&self) -> (usize, usize, usize, usize) {
        (self.b, self.o, self.oh, self.ow)
    }

    /// Length of one unfolded patch.
    pub(super) fn patch(&self) -> usize {
        self.c * self.kh * self.kw
    }

    /// Outputs of one channel of one image.
    pub(super) fn spatial(&self) -> usize {
        self.oh * self.ow
    }

    /// Whether the input is its own unfolding.
    pub(super) fn is_pointwise(&self) -> bool {
        self.kh == 1 && self.kw == 1 && self.spec == Conv2dSpec::padded(1, 0)
    }

    /// Small pictures are taken several at a time; large ones in parts.
    fn tiles(&self) -> Vec<Tile> {
        let (p, most) = (self.spatial().max(1), (TILE_ELEMENTS / self.patch()).max(64));
        if self.is_pointwise() && p >= 64 {
            return (0..self.b).map(|b| Tile { start: b * p, end: (b + 1) * p }).collect();
        }
        let per_tile = if p >= most { p.div_ceil(p.div_ceil(most)) } else { p * (most / p) };
        let within = if p >= most { p } else { self.b * p };
        let starts = (0..self.b * p).step_by(within).flat_map(|image| {
            (0..within)
                .step_by(per_tile)
                .map(move |at| Tile { start: image + at, end: image + (at + per_tile).min(within) })
        });
        starts.collect()
    }

    /// Bytes of the longest tile of patches, and of its outputs where it is over several images.
    fn scratch(&self) -> u64 {
        let tiles = self.tiles();
        let longest = tiles.iter().map(|tile| tile.len()).max().unwrap_or(0);
        let patches =
            if self.is_pointwise() && longest == self.spatial() { 0 } else { self.patch() * longest };
        let joined = tiles.iter().filter(|tile| self.pieces(**tile).count() > 1).map(|tile| tile.len()).max();
        4 * (patches + self.o * joined.unwrap_or(0)) as u64
    }

    /// The pieces of a tile that lie in one image each: `(image, first output, place in the tile, length)`.
    fn pieces(&self, tile: Tile) -> impl Iterator<Item = (usize, usize, usize, usize)> + Clone {
        let p = self.spatial();
        (tile.start / p..tile.end.div_ceil(p)).map(move |b| {
            let (from, to) = (tile.start.max(b * p), tile.end.min((b + 1) * p));
            (b, from - b * p, from - tile.start, to - from)
        })
    }

    /// For row `r` of the unfolding and the outputs of row `y` from `x0`: the input row and the range of outputs whose
    /// input column lies inside the picture, with the column of the first.
    #[inline]
    fn source(
        &self,
        ky: usize,
        kx: usize,
        y: usize,
        x0: usize,
        n: usize,
    ) -> Option<(usize, usize, usize, usize)> {
        let (stride, before) = (self.spec.stride, self.spec.before);
        let row = (y * stride + ky).checked_sub(before).filter(|&row| row < self.h)?;
        // Outputs x with 0 <= x * stride + kx - before < w.
        let first = before.saturating_sub(kx).div_ceil(stride).max(x0);
        let last = (self.w + before).checked_sub(kx + 1)? / stride;
        let end = (last + 1).min(x0 + n);
        (first < end).then(|| (row, first - x0, end - x0, first * stride + kx - before))
    }

    /// Unfolds the patches of `tile` into `col` `[C kh kw, len]`.
    fn unfold(&self, x: &[f32], tile: Tile, col: &mut [f32]) {
        let (n, k2, stride) = (tile.len(), self.kh * self.kw, self.spec.stride);
        let pieces = self.pieces(tile);
        col[..self.patch() * n].par_chunks_mut(n).with_min_len(k2).enumerate().for_each(|(r, col)| {
            let (c, ky, kx) = (r / k2, r % k2 / self.kw, r % self.kw);
            for (b, from, at, len) in pieces.clone() {
                let picture = &x[(b * self.c + c) * self.h * self.w..][..self.h * self.w];
                self.rows(from, len, |y, x0, offset, n_x| {
                    let out = &mut col[at + offset..][..n_x];
                    let Some((row, first, end, column)) = self.source(ky, kx, y, x0, n_x) else {
                        out.fill(0.0);
                        return;
                    };
                    out[..first].fill(0.0);
                    out[end..].fill(0.0);
                    let input = &picture[row * self.w..][..self.w];
                    if stride == 1 {
                        out[first..end].copy_from_slice(&input[column..][..end - first]);
                    } else {
                        out[first..end]
                            .iter_mut()
                            .zip(input[column..].iter().step_by(stride))
                            .for_each(|(o, i)| *o = *i);
                    }
                });
            }
        });
    }

    /// Adds the unfolded gradients `col` of `tile` to `dx`: the transpose of [`Conv::unfold`].
    fn fold(&self, col: &[f32], tile: Tile, dx: &mut [f32]) {
        let (n, k2, stride) = (tile.len(), self.kh * self.kw, self.spec.stride);
        let pieces = self.pieces(tile);
        let picture_len = self.h * self.w;
        dx.par_chunks_mut(picture_len).enumerate().for_each(|(i, picture)| {
            let (b, c) = (i / self.c, i % self.c);
            let Some((_, from, at, len)) = pieces.clone().find(|piece| piece.0 == b) else { return };
            for r in 0..k2 {
                let col = &col[(c * k2 + r) * n..][..n];
                self.rows(from, len, |y, x0, offset, n_x| {
                    let Some((row, first, end, column)) = self.source(r / self.kw, r % self.kw, y, x0, n_x)
                    else {
                        return;
                    };
                    let (input, out) = (&mut picture[row * self.w..][..self.w], &col[at + offset..][..n_x]);
                    if stride == 1 {
                        let input = &mut input[column..][..end - first];
                        input.iter_mut().zip(&out[first..end]).for_each(|(i, o)| *i += o);
                    } else {
                        input[column..]
                            .iter_mut()
                            .step_by(stride)
                            .zip(&out[first..end])
                            .for_each(|(i, o)| *i += o);
                    }
                });
            }
        });
    }

    /// Splits outputs `from..from + len` of one image into rows: `f(y, first x, offset, count)`.
    #[inline]
    fn rows(&self, from: usize, len: usize, mut f: impl FnMut(usize, usize, usize, usize)) {
        let mut at = from;
        while at < from + len {
            let (y, x0) = (at / self.ow, at % self.ow);
            let n = (self.ow - x0).min(from + len - at);
            f(y, x0, at - from, n);
            at += n;
        }
    }

    #[allow(unsafe_code)]
    fn forward(&self, x: &Tensor, weight: &Param, bias: Option<&Param>) -> Result<Vec<f32>> {
        let weight = weight.value();
        let (x, weight) = (View::of(x, "conv2d")?, View::of(&weight, "conv2d")?);
        let (o, k, p) = (self.o, self.patch(), self.spatial());
        let mut y = match bias {
            Some(bias) => {
                let bias = bias.value();
                let bias = View::of(&bias, "conv2d")?;
                let mut y = Vec::with_capacity(self.b * o * p);
                (0..self.b).for_each(|_| bias.iter().for_each(|&b| y.extend(std::iter::repeat_n(b, p))));
                y
            }
            None => zeros(self.b * o * p),
        };
        let weight = Mat::rows(&weight, k);
        let tiles = self.tiles();
        let longest = tiles.iter().map(|tile| tile.len()).max().unwrap_or(0);
        let is_input = self.is_pointwise() && longest == p;
        let mut col = zeros(if is_input { 0 } else { k * longest });
        let mut out = Vec::new();
        for tile in tiles {
            let n = tile.len();
            let whole = self.pieces(tile).count() == 1;
            let (b, from) = (tile.start / p, tile.start % p);
            let patches = if is_input {
                Mat::rows(&x[b * self.c * p..], p)
            } else {
                self.unfold(&x, tile, &mut col);
                Mat::rows(&col, n)
            };
            if whole {
                let to = Tiles::new(&mut y);
                // SAFETY: `y` is not touched elsewhere during the call.
                unsafe {
                    to.gemm(b * o * p + from, p, Into::Add, (o, n, k), (weight, patches), 1.0, Threads::All);
                }
            } else {
                out.resize(o * n, 0.0);
                gemm(&mut out, n, Into::Replace, (o, n, k), (weight, patches), 1.0, Threads::All);
                self.scatter(&out, tile, &mut y);
            }
        }
        Ok(y)
    }

    /// Adds `out` `[O, len]` of a tile over several images to `y` `[B, O, H', W']`.
    fn scatter(&self, out: &[f32], tile: Tile, y: &mut [f32]) {
        let (n, p) = (tile.len(), self.spatial());
        for (b, from, at, len) in self.pieces(tile) {
            for o in 0..self.o {
                let to = &mut y[(b * self.o + o) * p + from..][..len];
                to.iter_mut().zip(&out[o * n + at..][..len]).for_each(|(y, v)| *y += v);
            }
        }
    }

    /// The reverse of [`Conv::scatter`]: collects `dy` of a tile into `[O, len]`.
    fn gather(&self, dy: &[f32], tile: Tile, out: &mut Vec<f32>) {
        let (n, p) = (tile.len(), self.spatial());
        out.resize(self.o * n, 0.0);
        for (b, from, at, len) in self.pieces(tile) {
            for o in 0..self.o {
                out[o * n + at..][..len].copy_from_slice(&dy[(b * self.o + o) * p + from..][..len]);
            }
        }
    }

    fn backward(
        &self,
        x: &Tensor,
        dy: &Tensor,
        weight: &Param,
        bias: Option<&Param>,
    ) -> Result<Option<Tensor>> {
        let (wants_dx, wants_dw) = (x.track_op(), weight.is_trainable());
        let w = weight.value();
        let (input, dy, w) = (View::of(x, "conv2d")?, View::of(dy, "conv2d")?, View::of(&w, "conv2d")?);
        let (o, k, p) = (self.o, self.patch(), self.spatial());
        if let Some(bias) = bias.filter(|bias| bias.is_trainable()) {
            bias.add_grad(Computed::cpu(channel_sums(&dy, o, p), o).detached())?;
        }
        let mut dw = Vec::new();
        let mut dx = zeros(if wants_dx { input.len() } else { 0 });
        let tiles = if wants_dw || wants_dx { self.tiles() } else { Vec::new() };
        let longest = tiles.iter().map(|tile| tile.len()).max().unwrap_or(0);
        let is_input = self.is_pointwise() && longest == p;
        let mut col = zeros(if is_input { 0 } else { k * longest });
        let mut gathered = Vec::new();
        for (i, tile) in tiles.into_iter().enumerate() {
            let n = tile.len();
            let (b, from) = (tile.start / p, tile.start % p);
            let dy = if self.pieces(tile).count() == 1 {
                Mat::rows(&dy[b * o * p + from..], p)
            } else {
                self.gather(&dy, tile, &mut gathered);
                Mat::rows(&gathered, n)
            };
            if wants_dw {
                let patches = if is_input {
                    Mat::rows(&input[b * self.c * p..], p)
                } else {
                    self.unfold(&input, tile, &mut col);
                    Mat::rows(&col, n)
                };
                if i == 0 {
                    dw = product((o, k, n), (dy, patches.t()), 1.0);
                } else {
                    gemm(&mut dw, k, Into::Add, (o, k, n), (dy, patches.t()), 1.0, Threads::All);
                }
            }
            if wants_dx && is_input {
                let dx = &mut dx[b * self.c * p..][..self.c * p];
                gemm(dx, p, Into::Replace, (k, n, o), (Mat::rows(&w, k).t(), dy), 1.0, Threads::All);
            } else if wants_dx {
                gemm(&mut col, n, Into::Replace, (k, n, o), (Mat::rows(&w, k).t(), dy), 1.0, Threads::All);
                self.fold(&col, tile, &mut dx);
            }
        }
        if wants_dw {
            weight.add_grad(Computed::cpu(dw, weight.dims()).detached())?;
        }
        Ok(wants_dx.then(|| Computed::cpu(dx, x.dims()).detached()))
    }
}

/// Sums `[B, C, spatial]` to `[C]`.
pub(super) fn channel_sums(dy: &[f32], c: usize, spatial: usize) -> Vec<f32> {
    let mut total = vec![0.0_f64; c];
    dy.chunks(spatial.max(1)).enumerate().for_each(|(i, channel)| total[i % c] += sum(channel, |v| v));
    total.into_iter().map(|sum| sum as f32).collect()
}
