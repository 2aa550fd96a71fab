//! Group normalisation, with SiLU fused behind it.

use candle_core::{Device, Result, Tensor, bail};
use rayon::prelude::*;

use super::activation::silu_slope;
use super::cpu::{View, moments, sigmoid, sum, sum2, zeros};
use super::custom_op::{Computed, custom_op, trained_tag};
use crate::dry_run::{Cost, DryTensor, gradient_bytes};
use crate::param::Param;

/// Group norm (Wu and He 2018, arXiv 1803.08494), followed by SiLU if `silu`.
///
/// `x` `[B, C, ..]`; `n_groups` divides `C`; `weight` and `bias` `[C]`. Gives the shape of `x`. Differentiable in all
/// three. Statistics are summed in f64 on the CPU, in f32 on a GPU.
pub fn group_norm(
    x: &Tensor,
    weight: &Param,
    bias: &Param,
    n_groups: usize,
    eps: f64,
    silu: bool,
) -> Result<Tensor> {
    normalise(x, None, (weight, bias), n_groups, eps, silu)
}

/// [`group_norm()`] of `x + shift`: `x` `[B, C, h, w]`, and `shift` `[B, C]` is added to every pixel of its channel.
///
/// Differentiable in `shift` as well. A GPU does not store the sum. Errors if `shift` has another shape.
pub fn group_norm_shifted(
    x: &Tensor,
    shift: &Tensor,
    (weight, bias): (&Param, &Param),
    n_groups: usize,
    eps: f64,
    silu: bool,
) -> Result<Tensor> {
    let (b, c, ..) = x.dims4()?;
    if shift.dims() != [b, c] {
        bail!("{}: wanted [{b}, {c}] to add, got {:?}", weight.name(), shift.dims());
    }
    if x.device().is_cuda() {
        return normalise(x, Some(&shift.to_dtype(x.dtype())?), (weight, bias), n_groups, eps, silu);
    }
    let x = x.broadcast_add(&shift.unsqueeze(2)?.unsqueeze(3)?)?; // [B, C, 1, 1]
    normalise(&x, None, (weight, bias), n_groups, eps, silu)
}

/// `shift` on a GPU only.
fn normalise(
    x: &Tensor,
    shift: Option<&Tensor>,
    (weight, bias): (&Param, &Param),
    n_groups: usize,
    eps: f64,
    silu: bool,
) -> Result<Tensor> {
    let c = weight.dims()[0];
    if x.rank() < 2 || x.dim(1)? != c || n_groups == 0 || !c.is_multiple_of(n_groups) {
        bail!("{}: wanted [B, {c}, ..] in {n_groups} groups, got {:?}", weight.name(), x.dims());
    }
    let (x, tag) = (x.contiguous()?, trained_tag(weight, Some(bias)));
    let norm = Norm { c, n_groups, spatial: x.dims()[2..].iter().product(), eps, silu };
    // A GPU's forward takes rows of a larger tensor without a copy, its backward does not.
    let is_tracked = x.track_op() || tag.track_op() || shift.is_some_and(Tensor::track_op);
    let shift = match shift {
        Some(shift) if is_tracked => Some(shift.contiguous()?),
        shift => shift.cloned(),
    };
    let inputs: Vec<Tensor> = [x.clone(), tag].into_iter().chain(shift.clone()).collect();
    let inputs: Vec<&Tensor> = inputs.iter().collect();
    let (w, b) = (weight.clone(), bias.clone());
    match x.device() {
        Device::Cpu => {
            let value = Computed::cpu(norm.forward(&x, weight, bias)?, x.dims());
            custom_op("group_norm", &inputs, value, move |dy| {
                Ok([norm.backward(&x, dy, &w, &b)?, None, None])
            })
        }
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => {
            let (value, statistics) = super::cuda::group_norm(&x, shift.as_ref(), weight, bias, &norm)?;
            custom_op("group_norm", &inputs, value, move |dy| {
                let inputs = (&x, shift.as_ref());
                let [dx, dshift] = super::cuda::group_norm_backward(inputs, dy, &w, &b, &norm, &statistics)?;
                Ok([dx, None, dshift])
            })
        }
        other => bail!("group_norm: no kernel for {other:?}"),
    }
}

/// [`group_norm()`] in a dry run. Its input is kept; the statistics that a GPU keeps are too few to count. The backward
/// works out the input's gradient whether it is wanted or not, for the weights' come from it.
pub(crate) fn dry(x: &DryTensor, weight: &Param, bias: &Param) -> DryTensor {
    let x = x.contiguous();
    let backward_scratch = if x.is_tracked() { 0 } else { x.bytes() };
    let cost = Cost { backward_scratch, gradients: gradient_bytes([weight, bias]), ..Cost::default() };
    x.custom(&[&x], x.dims(), cost)
}

/// [`group_norm_shifted()`] in a dry run: a GPU has no sum.
pub(crate) fn dry_shifted(x: &DryTensor, shift: &DryTensor, weight: &Param, bias: &Param) -> DryTensor {
    if !x.meter().on_gpu() {
        let [b, c] = [0, 1].map(|axis| shift.dims()[axis]);
        return dry(&x.broadcast_plus(&shift.reshape(&[b, c, 1, 1])), weight, bias);
    }
    let x = x.contiguous();
    let backward_scratch = if x.is_tracked() { 0 } else { x.bytes() };
    let cost = Cost { backward_scratch, gradients: gradient_bytes([weight, bias]), ..Cost::default() };
    x.custom(&[&x, shift], x.dims(), cost)
}

/// What does not depend on the data.
#[derive(Clone, Copy)]
pub(super) struct Norm {
    pub(crate) c: usize,
    pub(crate) n_groups: usize,
    /// Elements of one channel of one image.
    pub(crate) spatial: usize,
    pub(crate) eps: f64,
    pub(crate) silu: bool,
}

impl Norm {
    fn per_group(&self) -> usize {
        self.c / self.n_groups
    }

    /// The channels of the group with number `i`, counted over the batch.
    fn channels(&self, i: usize) -> std::ops::Range<usize> {
        let first = i % self.n_groups * self.per_group();
        first..first + self.per_group()
    }

    fn forward(&self, x: &Tensor, weight: &Param, bias: &Param) -> Result<Vec<f32>> {
        let (weight, bias) = (weight.value(), bias.value());
        let (x, weight, bias) =
            (View::of(x, "group_norm")?, View::of(&weight, "group_norm")?, View::of(&bias, "group_norm")?);
        let (weight, bias) = (&weight[..], &bias[..]);
        let group = self.per_group() * self.spatial;
        let mut y = zeros(x.len());
        y.par_chunks_mut(group).zip(x.par_chunks(group)).enumerate().for_each(|(i, (y, x))| {
            let (mean, rstd) = moments(x, self.eps);
            let channels = y.chunks_mut(self.spatial).zip(x.chunks(self.spatial));
            for (c, (y, x)) in self.channels(i).zip(channels) {
                let (a, b) = (rstd * weight[c], bias[c] - mean * rstd * weight[c]);
                if self.silu {
                    y.iter_mut().zip(x).for_each(|(y, &x)| {
                        let v = x.mul_add(a, b);
                        *y = v * sigmoid(v);
                    });
                } else {
                    y.iter_mut().zip(x).for_each(|(y, &x)| *y = x.mul_add(a, b));
                }
            }
        });
        Ok(y)
    }

    fn backward(&self, x: &Tensor, dy: &Tensor, weight: &Param, bias: &Param) -> Result<Option<Tensor>> {
        let (w, b) = (weight.value(), bias.value());
        let (input, dy) = (View::of(x, "group_norm")?, View::of(dy, "group_norm")?);
        let (w, b) = (View::of(&w, "group_norm")?, View::of(&b, "group_norm")?);
        let (w, b) = (&w[..], &b[..]);
        let (spatial, group) = (self.spatial, self.per_group() * self.spatial);
        let mut dx = zeros(input.len());
        // Per image and channel: sum of g and of g x_hat, where g is the gradient before weight and bias.
        let mut sums = vec![[0.0_f64; 2]; input.len() / spatial];
        let groups = dx.par_chunks_mut(group).zip(sums.par_chunks_mut(self.per_group()));
        let groups = groups.zip(input.par_chunks(group)).zip(dy.par_chunks(group)).enumerate();
        groups.for_each(|(i, (((dx, sums), x), dy))| {
            let (mean, rstd) = moments(x, self.eps);
            let (mut mean_g, mut mean_gx) = (0.0, 0.0);
            let channels = dx.chunks_mut(spatial).zip(x.chunks(spatial)).zip(dy.chunks(spatial));
            for ((c, ((g, x), dy)), sums) in self.channels(i).zip(channels).zip(sums.iter_mut()) {
                let (scale, shift) = (rstd * w[c], b[c] - mean * rstd * w[c]);
                if self.silu {
                    for j in 0..spatial {
                        g[j] = dy[j] * silu_slope(x[j].mul_add(scale, shift));
                    }
                } else {
                    g.copy_from_slice(dy);
                }
                *sums = [sum(g, |g| g), sum2(g, x, |g, x| g * (x - mean) * rstd)];
                mean_g += sums[0] * f64::from(w[c]);
                mean_gx += sums[1] * f64::from(w[c]);
            }
            let (mean_g, mean_gx) = ((mean_g / group as f64) as f32, (mean_gx / group as f64) as f32);
            let channels = dx.chunks_mut(spatial).zip(x.chunks(spatial));
            for (c, (dx, x)) in self.channels(i).zip(channels) {
                let w = w[c];
                for j in 0..spatial {
                    dx[j] = rstd * (dx[j] * w - mean_g - (x[j] - mean) * rstd * mean_gx);
                }
            }
        });
        for (param, which) in [(bias, 0), (weight, 1)] {
            if param.is_trainable() {
                let mut total = vec![0.0_f64; self.c];
                sums.iter().enumerate().for_each(|(i, sums)| total[i % self.c] += sums[which]);
                let total = total.into_iter().map(|sum| sum as f32).collect();
                param.add_grad(Computed::cpu(total, self.c).detached())?;
            }
        }
        Ok(x.track_op().then(|| Computed::cpu(dx, x.dims()).detached()))
    }
}
