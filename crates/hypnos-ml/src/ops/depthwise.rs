//! Depthwise convolution: each channel with its own small kernel.

use candle_core::{Device, Result, Tensor, bail};
use rayon::prelude::*;

use super::conv2d::{Conv2dSpec, channel_sums};
use super::cpu::{View, sum2, zeros};
use super::custom_op::{Computed, custom_op, trained_tag};
use crate::dry_run::{Cost, DryTensor};
use crate::param::Param;

/// Convolution with as many groups as channels.
///
/// * `x` `[B, C, H, W]`
/// * `weight` `[C, 1, kh, kw]`; `bias` `[C]`
///
/// Gives `[B, C, H', W']`. Differentiable in `x`, `weight` and `bias`.
pub fn depthwise_conv2d(
    x: &Tensor,
    weight: &Param,
    bias: Option<&Param>,
    spec: Conv2dSpec,
) -> Result<Tensor> {
    let x = x.contiguous()?;
    let conv = Depthwise::new(&x, weight, spec)?;
    let value = match x.device() {
        Device::Cpu => Computed::cpu(conv.forward(&x, weight, bias)?, conv.out_dims()),
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => super::cuda::depthwise(&x, weight, bias, &conv)?,
        other => bail!("depthwise_conv2d: no kernel for {other:?}"),
    };
    let (weight, bias, input) = (weight.clone(), bias.cloned(), x.clone());
    let tag = trained_tag(&weight, bias.as_ref());
    custom_op("depthwise_conv2d", &[&x, &tag], value, move |dy| {
        let dx = match dy.device() {
            Device::Cpu => conv.backward(&input, dy, &weight, bias.as_ref())?,
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => super::cuda::depthwise_backward(&input, dy, &weight, bias.as_ref(), &conv)?,
            other => bail!("depthwise_conv2d: no kernel for {other:?}"),
        };
        Ok([dx, None, None])
    })
}

/// [`depthwise_conv2d()`] with a square kernel and frozen weights in a dry run. Its input is kept.
pub(crate) fn dry(x: &DryTensor, kernel: usize, spec: Conv2dSpec) -> DryTensor {
    let x = x.contiguous();
    let out = |size: usize| spec.out(size, kernel).unwrap_or(0);
    let [b, c, h, w] = [0, 1, 2, 3].map(|axis| x.dims()[axis]);
    let dims = [b, c, out(h), out(w)];
    let flops = 2.0 * dims.iter().product::<usize>() as f64 * (kernel * kernel) as f64;
    x.custom(&[&x], &dims, Cost { flops, input_flops: flops, is_convolution: true, ..Cost::default() })
}

/// Sizes of one depthwise convolution.
#[derive(Clone, Copy, Debug)]
pub(super) struct Depthwise {
    pub(crate) b: usize,
    pub(crate) c: usize,
    pub(crate) h: usize,
    pub(crate) w: usize,
    pub(crate) kh: usize,
    pub(crate) kw: usize,
    pub(crate) oh: usize,
    pub(crate) ow: usize,
    pub(crate) spec: Conv2dSpec,
}

impl Depthwise {
    fn new(x: &Tensor, weight: &Param, spec: Conv2dSpec) -> Result<Self> {
        let ((b, c, h, w), dims) = (x.dims4()?, weight.dims());
        let [c_w, 1, kh, kw] = dims[..] else {
            bail!("{}: wanted a weight [C, 1, kh, kw], got {dims:?}", weight.name());
        };
        match (spec.out(h, kh), spec.out(w, kw)) {
            (Some(oh), Some(ow)) if c == c_w && spec.stride > 0 => {
                Ok(Self { b, c, h, w, kh, kw, oh, ow, spec })
            }
            _ => bail!("{}: {dims:?} does not fit inputs {:?}", weight.name(), x.dims()),
        }
    }

    pub(super) fn out_dims(&self) -> (usize, usize, usize, usize) {
        (self.b, self.c, self.oh, self.ow)
    }

    /// Calls `f(output row, input row, input column of output 0, first output, end)` for each row that tap `(ky, kx)`
    /// touches; outputs outside `first..end` would read padding.
    #[inline]
    fn rows(&self, ky: usize, kx: usize, mut f: impl FnMut(usize, usize, usize, usize)) {
        let (stride, before) = (self.spec.stride, self.spec.before);
        let first = before.saturating_sub(kx).div_ceil(stride);
        let Some(last) = (self.w + before).checked_sub(kx + 1) else { return };
        let end = (last / stride + 1).min(self.ow);
        for y in 0..self.oh {
            let row = (y * stride + ky).wrapping_sub(before);
            if row < self.h && first < end {
                f(y * self.ow + first, row * self.w + first * stride + kx - before, end - first, stride);
            }
        }
    }

    fn forward(&self, x: &Tensor, weight: &Param, bias: Option<&Param>) -> Result<Vec<f32>> {
        let (weight, bias) = (weight.value(), bias.map(Param::value));
        let (x, weight) = (View::of(x, "depthwise_conv2d")?, View::of(&weight, "depthwise_conv2d")?);
        let bias = bias.as_ref().map(|bias| View::of(bias, "depthwise_conv2d")).transpose()?;
        let (x, weight, bias) = (&x[..], &weight[..], bias.as_deref());
        let (p, k2) = (self.oh * self.ow, self.kh * self.kw);
        let mut y = zeros(self.b * self.c * p);
        y.par_chunks_mut(p.max(1)).zip(x.par_chunks(self.h * self.w)).enumerate().for_each(|(i, (y, x))| {
            let c = i % self.c;
            y.fill(bias.map_or(0.0, |bias| bias[c]));
            for r in 0..k2 {
                let tap = weight[c * k2 + r];
                self.rows(r / self.kw, r % self.kw, |to, from, n, stride| {
                    let inputs = x[from..].iter().step_by(stride);
                    y[to..to + n].iter_mut().zip(inputs).for_each(|(y, x)| *y += tap * x);
                });
            }
        });
        Ok(y)
    }

    fn backward(
        &self,
        x: &Tensor,
        dy: &Tensor,
        weight: &Param,
        bias: Option<&Param>,
    ) -> Result<Option<Tensor>> {
        let w = weight.value();
        let (input, dy) = (View::of(x, "depthwise_conv2d")?, View::of(dy, "depthwise_conv2d")?);
        let w = View::of(&w, "depthwise_conv2d")?;
        let (input, dy, w) = (&input[..], &dy[..], &w[..]);
        let (p, k2, picture) = (self.oh * self.ow, self.kh * self.kw, self.h * self.w);
        if let Some(bias) = bias.filter(|bias| bias.is_trainable()) {
            bias.add_grad(Computed::cpu(channel_sums(dy, self.c, p), self.c).detached())?;
        }
        if weight.is_trainable() {
            let mut dw = zeros(self.c * k2);
            dw.par_chunks_mut(k2).enumerate().for_each(|(c, dw)| {
                for b in 0..self.b {
                    let (x, dy) = (&input[(b * self.c + c) * picture..], &dy[(b * self.c + c) * p..]);
                    for (r, dw) in dw.iter_mut().enumerate() {
                        *dw += self.tap_gradient(r, x, dy) as f32;
                    }
                }
            });
            weight.add_grad(Computed::cpu(dw, weight.dims()).detached())?;
        }
        if !x.track_op() {
            return Ok(None);
        }
        let mut dx = zeros(input.len());
        dx.par_chunks_mut(picture.max(1)).zip(dy.par_chunks(p.max(1))).enumerate().for_each(
            |(i, (dx, dy))| {
                for r in 0..k2 {
                    let tap = w[i % self.c * k2 + r];
                    self.rows(r / self.kw, r % self.kw, |to, from, n, stride| {
                        let inputs = dx[from..].iter_mut().step_by(stride);
                        inputs.zip(&dy[to..to + n]).for_each(|(dx, dy)| *dx += tap * dy);
                    });
                }
            },
        );
        Ok(Some(Computed::cpu(dx, x.dims()).detached()))
    }

    /// Gradient of tap `r` over one channel of one image.
    fn tap_gradient(&self, r: usize, x: &[f32], dy: &[f32]) -> f64 {
        let mut total = 0.0;
        self.rows(r / self.kw, r % self.kw, |to, from, n, stride| {
            total += if stride == 1 {
                sum2(&x[from..from + n], &dy[to..to + n], |x, dy| x * dy)
            } else {
                let inputs = x[from..].iter().step_by(stride);
                inputs.zip(&dy[to..to + n]).map(|(x, dy)| f64::from(x * dy)).sum()
            };
        });
        total
    }
}
