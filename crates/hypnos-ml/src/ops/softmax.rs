//! Softmax over the last dimension.

use candle_core::{Device, Result, Tensor, bail};
use rayon::prelude::*;

use super::cpu::{View, exp, sum2, zeros};
use super::custom_op::{Computed, custom_op_with_result};

/// `e^x / sum e^x` over the last dimension. Any shape; differentiable.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    let Some(&width) = x.dims().last() else { bail!("softmax: got a scalar") };
    let x = x.contiguous()?;
    let value = match x.device() {
        Device::Cpu => {
            let mut y = View::of(&x, "softmax")?.to_vec();
            y.par_chunks_mut(width.max(1)).with_min_len(8).for_each(softmax_row);
            Computed::cpu(y, x.dims())
        }
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => super::cuda::softmax(&x)?,
        other => bail!("softmax: no kernel for {other:?}"),
    };
    custom_op_with_result("softmax", &[&x], value, move |y, dy| {
        let dx = match dy.device() {
            Device::Cpu => Computed::cpu(backward(y, dy, width)?, dy.dims()),
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => super::cuda::softmax_backward(y, dy)?,
            other => bail!("softmax: no kernel for {other:?}"),
        };
        Ok([Some(dx.detached()), None, None])
    })
}

fn backward(y: &Tensor, dy: &Tensor, width: usize) -> Result<Vec<f32>> {
    let (y, dy) = (View::of(y, "softmax")?, View::of(dy, "softmax")?);
    let mut dx = zeros(y.len());
    let rows = dx.par_chunks_mut(width).zip(y.par_chunks(width)).zip(dy.par_chunks(width));
    rows.with_min_len(8).for_each(|((dx, y), dy)| {
        let dot = sum2(y, dy, |y, dy| y * dy) as f32;
        for i in 0..width {
            dx[i] = y[i] * (dy[i] - dot);
        }
    });
    Ok(dx)
}

/// Softmax of one row in place. The largest element is taken out first, so nothing overflows.
pub(super) fn softmax_row(row: &mut [f32]) {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let wide = row.chunks_exact(16);
    let rest = wide.remainder().iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for chunk in wide {
        for i in 0..16 {
            lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
        }
    }
    let max = lanes.iter().copied().fold(rest, f32::max);
    let mut sums = [0.0_f32; 16];
    let mut wide = row.chunks_exact_mut(16);
    for chunk in &mut wide {
        for i in 0..16 {
            chunk[i] = exp(chunk[i] - max);
            sums[i] += chunk[i];
        }
    }
    let mut total = sums.iter().sum::<f32>();
    for value in wide.into_remainder() {
        *value = exp(*value - max);
        total += *value;
    }
    let scale = 1.0 / total;
    row.iter_mut().for_each(|value| *value *= scale);
}
