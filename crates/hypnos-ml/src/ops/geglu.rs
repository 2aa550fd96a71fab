//! The gated unit of the UNet's feed-forward: `a gelu(b)`.

use candle_core::{Device, Result, Tensor, bail};
use rayon::prelude::*;

use super::activation::{gelu_slope, normal_cdf};
use super::cpu::{View, zeros};
use super::custom_op::{Computed, custom_op};
use crate::dry_run::{Cost, DryTensor};

/// GEGLU (Shazeer 2020, arXiv 2002.05202) with the exact Gaussian error function, as diffusers has it.
///
/// `x` `[.., 2D]`, value in the first half of the last dimension, gate in the second. Gives `[.., D]`. Differentiable.
pub fn geglu(x: &Tensor) -> Result<Tensor> {
    let Some((&width, lead)) = x.dims().split_last() else { bail!("geglu: got a scalar") };
    if width % 2 != 0 {
        bail!("geglu: wanted an even last dimension, got {:?}", x.dims());
    }
    let x = x.contiguous()?;
    let shape = [lead, &[width / 2]].concat();
    let value = match x.device() {
        Device::Cpu => Computed::cpu(forward(&x, width / 2)?, shape),
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => super::cuda::geglu(&x, shape)?,
        other => bail!("geglu: no kernel for {other:?}"),
    };
    let input = x.clone();
    custom_op("geglu", &[&x], value, move |dy| {
        let dx = match dy.device() {
            Device::Cpu => Computed::cpu(backward(&input, dy, width / 2)?, input.dims()),
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => super::cuda::geglu_backward(&input, dy)?,
            other => bail!("geglu: no kernel for {other:?}"),
        };
        Ok([Some(dx.detached()), None, None])
    })
}

/// [`geglu()`] in a dry run. Its input, twice as wide as its result, is kept.
pub(crate) fn dry(x: &DryTensor) -> DryTensor {
    let x = x.contiguous();
    let mut dims = x.dims().to_vec();
    if let Some(width) = dims.last_mut() {
        *width /= 2;
    }
    x.custom(&[&x], &dims, Cost::default())
}

fn forward(x: &Tensor, d: usize) -> Result<Vec<f32>> {
    let x = View::of(x, "geglu")?;
    let mut y = zeros(x.len() / 2);
    y.par_chunks_mut(d).zip(x.par_chunks(2 * d)).with_min_len(4).for_each(|(y, x)| {
        let (value, gate) = x.split_at(d);
        for i in 0..d {
            y[i] = value[i] * gate[i] * normal_cdf(gate[i]);
        }
    });
    Ok(y)
}

fn backward(x: &Tensor, dy: &Tensor, d: usize) -> Result<Vec<f32>> {
    let (x, dy) = (View::of(x, "geglu")?, View::of(dy, "geglu")?);
    let mut dx = zeros(x.len());
    let rows = dx.par_chunks_mut(2 * d).zip(x.par_chunks(2 * d)).zip(dy.par_chunks(d));
    rows.with_min_len(4).for_each(|((dx, x), dy)| {
        let ((value, gate), (d_value, d_gate)) = (x.split_at(d), dx.split_at_mut(d));
        for i in 0..d {
            d_value[i] = dy[i] * gate[i] * normal_cdf(gate[i]);
            d_gate[i] = dy[i] * value[i] * gelu_slope(gate[i]);
        }
    });
    Ok(dx)
}
