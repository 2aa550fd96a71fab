//! Layer normalisation.

use candle_core::{Device, Result, Tensor, bail};
use rayon::prelude::*;

use super::cpu::{View, moments, sum, sum2, zeros};
use super::custom_op::{Computed, custom_op, trained_tag};
use super::linear::column_sums;
use crate::dry_run::{Cost, DryTensor, gradient_bytes};
use crate::param::Param;

/// Layer norm over the last dimension (Ba et al. 2016, arXiv 1607.06450): `(x - mean) / sqrt(var + eps) * weight +
/// bias`.
///
/// `x` `[.., D]`, `weight` and `bias` `[D]`. Gives the shape of `x`. Differentiable in all three.
pub fn layer_norm(x: &Tensor, weight: &Param, bias: &Param, eps: f64) -> Result<Tensor> {
    let d = weight.dims()[0];
    if x.dims().last() != Some(&d) {
        bail!("{}: wanted inputs of width {d}, got {:?}", weight.name(), x.dims());
    }
    let x = x.contiguous()?;
    let tag = trained_tag(weight, Some(bias));
    let (input, w, b) = (x.clone(), weight.clone(), bias.clone());
    match x.device() {
        Device::Cpu => {
            let value = Computed::cpu(forward(&x, weight, bias, eps)?, x.dims());
            custom_op("layer_norm", &[&x, &tag], value, move |dy| {
                Ok([backward(&input, dy, &w, &b, eps)?, None, None])
            })
        }
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => {
            let (value, statistics) = super::cuda::layer_norm(&x, weight, bias, eps)?;
            custom_op("layer_norm", &[&x, &tag], value, move |dy| {
                Ok([super::cuda::layer_norm_backward(&input, dy, &w, &b, &statistics)?, None, None])
            })
        }
        other => bail!("layer_norm: no kernel for {other:?}"),
    }
}

/// [`layer_norm()`] in a dry run. Its input is kept. The backward normalises it once more, and works out its gradient
/// whether it is wanted or not.
pub(crate) fn dry(x: &DryTensor, weight: &Param, bias: &Param) -> DryTensor {
    let x = x.contiguous();
    let backward_scratch = if x.is_tracked() { x.bytes() } else { 2 * x.bytes() };
    let cost = Cost { backward_scratch, gradients: gradient_bytes([weight, bias]), ..Cost::default() };
    x.custom(&[&x], x.dims(), cost)
}

fn forward(x: &Tensor, weight: &Param, bias: &Param, eps: f64) -> Result<Vec<f32>> {
    let (weight, bias) = (weight.value(), bias.value());
    let (x, weight, bias) =
        (View::of(x, "layer_norm")?, View::of(&weight, "layer_norm")?, View::of(&bias, "layer_norm")?);
    let d = weight.len();
    let mut y = zeros(x.len());
    let (weight, bias) = (&weight[..], &bias[..]);
    y.par_chunks_mut(d).zip(x.par_chunks(d)).with_min_len(16).for_each(|(y, x)| {
        let (mean, rstd) = moments(x, eps);
        for i in 0..d {
            y[i] = (x[i] - mean) * rstd * weight[i] + bias[i];
        }
    });
    Ok(y)
}

fn backward(x: &Tensor, dy: &Tensor, weight: &Param, bias: &Param, eps: f64) -> Result<Option<Tensor>> {
    let value = weight.value();
    let (input, dy, w) =
        (View::of(x, "layer_norm")?, View::of(dy, "layer_norm")?, View::of(&value, "layer_norm")?);
    let d = w.len();
    if bias.is_trainable() {
        bias.add_grad(Computed::cpu(column_sums(&dy, d), d).detached())?;
    }
    // The normalised input is made again: cheaper than keeping it.
    let mut x_hat = zeros(input.len());
    let mut dx = zeros(input.len());
    let w = &w[..];
    let rows =
        dx.par_chunks_mut(d).zip(x_hat.par_chunks_mut(d)).zip(input.par_chunks(d)).zip(dy.par_chunks(d));
    rows.with_min_len(16).for_each(|(((dx, x_hat), x), dy)| {
        let (mean, rstd) = moments(x, eps);
        for i in 0..d {
            x_hat[i] = (x[i] - mean) * rstd;
            dx[i] = dy[i] * w[i];
        }
        let mean_g = (sum(dx, |g| g) / d as f64) as f32;
        let mean_gx = (sum2(dx, x_hat, |g, h| g * h) / d as f64) as f32;
        for i in 0..d {
            dx[i] = rstd * (dx[i] - mean_g - x_hat[i] * mean_gx);
        }
        // From here on the buffer holds this row's part of the weight's gradient.
        for i in 0..d {
            x_hat[i] *= dy[i];
        }
    });
    if weight.is_trainable() {
        weight.add_grad(Computed::cpu(column_sums(&x_hat, d), d).detached())?;
    }
    Ok(x.track_op().then(|| Computed::cpu(dx, x.dims()).detached()))
}
