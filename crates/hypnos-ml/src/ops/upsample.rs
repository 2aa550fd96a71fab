//! Upsampling: nearest neighbour to any size, bilinear by whole factors.

use candle_core::{Device, Result, Tensor, bail};
use rayon::prelude::*;

use super::cpu::{View, zeros};
use super::custom_op::{Computed, custom_op};
use super::linear::linear;
use crate::dry_run::{Cost, DryTensor};
use crate::param::Param;

/// Each output takes the input at `floor(i * in / out)`, as `torch.nn.functional.interpolate(mode="nearest")` does.
///
/// `x` `[B, C, H, W]`; gives `[B, C, h, w]` for `size = (h, w)`. Differentiable: an input's gradient is the sum over
/// the outputs that took it.
pub fn upsample_nearest(x: &Tensor, size: (usize, usize)) -> Result<Tensor> {
    let x = x.contiguous()?;
    let (b, c, h, w) = x.dims4()?;
    if h == 0 || w == 0 {
        bail!("upsample_nearest: an empty picture {:?}", x.dims());
    }
    let resize = Resize { from: (h, w), to: size };
    let shape = (b, c, size.0, size.1);
    let value = match x.device() {
        Device::Cpu => Computed::cpu(resize.forward(&x)?, shape),
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => super::cuda::upsample(&x, &resize)?,
        other => bail!("upsample_nearest: no kernel for {other:?}"),
    };
    custom_op("upsample_nearest", &[&x], value, move |dy| {
        let dx = match dy.device() {
            Device::Cpu => Computed::cpu(resize.backward(dy)?, (b, c, h, w)),
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => super::cuda::upsample_backward(dy, &resize)?,
            other => bail!("upsample_nearest: no kernel for {other:?}"),
        };
        Ok([Some(dx.detached()), None, None])
    })
}

/// [`upsample_nearest()`] in a dry run. The graph keeps its input, though the backward does not look at it.
pub(crate) fn dry_nearest(x: &DryTensor, size: (usize, usize)) -> DryTensor {
    let x = x.contiguous();
    let dims = [x.dims()[0], x.dims()[1], size.0, size.1];
    x.custom(&[&x], &dims, Cost::default())
}

/// Bilinear, by a whole factor. With `align_corners` the corner pixels' centres stay where they are, without it their
/// outer edges; as `torch.nn.functional.interpolate(mode="bilinear")` does.
///
/// `x` `[B, C, H, W]`; gives `[B, C, factor * H, factor * W]`. Differentiable.
pub(crate) fn upsample_bilinear(x: &Tensor, factor: usize, align_corners: bool) -> Result<Tensor> {
    let (.., h, w) = x.dims4()?;
    let along = |x: &Tensor, n: usize| linear(x, &between(n, factor, align_corners, x.device())?, None);
    let wide = along(x, w)?.transpose(2, 3)?;
    along(&wide, h)?.transpose(2, 3)?.contiguous()
}

/// What each of `factor * n` points takes of the `n` that there are, `[factor * n, n]`, frozen.
fn between(n: usize, factor: usize, align_corners: bool, device: &Device) -> Result<Param> {
    let n_out = n * factor;
    let mut taken = vec![0f32; n_out * n];
    for (i, row) in taken.chunks_exact_mut(n).enumerate() {
        let at = if align_corners {
            i as f64 * (n - 1) as f64 / (n_out - 1).max(1) as f64
        } else {
            ((i as f64 + 0.5) / factor as f64 - 0.5).max(0.0)
        };
        let (low, share) = ((at.floor() as usize).min(n - 1), at.fract() as f32);
        row[low] += 1.0 - share;
        row[(low + 1).min(n - 1)] += share;
    }
    Param::new("bilinear", Tensor::from_vec(taken, (n_out, n), device)?, false)
}

/// Heights and widths.
#[derive(Clone, Copy)]
pub(super) struct Resize {
    pub(crate) from: (usize, usize),
    pub(crate) to: (usize, usize),
}

impl Resize {
    fn forward(self, x: &Tensor) -> Result<Vec<f32>> {
        let (x, ((h, w), (oh, ow))) = (View::of(x, "upsample_nearest")?, (self.from, self.to));
        let columns: Vec<usize> = (0..ow).map(|j| j * w / ow).collect();
        let mut y = zeros(x.len() / (h * w) * oh * ow);
        y.par_chunks_mut((oh * ow).max(1)).zip(x.par_chunks(h * w)).for_each(|(y, x)| {
            for (i, y) in y.chunks_exact_mut(ow).enumerate() {
                let x = &x[i * h / oh * w..][..w];
                y.iter_mut().zip(&columns).for_each(|(y, &j)| *y = x[j]);
            }
        });
        Ok(y)
    }

    fn backward(self, dy: &Tensor) -> Result<Vec<f32>> {
        let (dy, ((h, w), (oh, ow))) = (View::of(dy, "upsample_nearest")?, (self.from, self.to));
        let columns: Vec<usize> = (0..ow).map(|j| j * w / ow).collect();
        let mut dx = zeros(dy.len() / (oh * ow).max(1) * h * w);
        dx.par_chunks_mut(h * w).zip(dy.par_chunks((oh * ow).max(1))).for_each(|(dx, dy)| {
            for (i, dy) in dy.chunks_exact(ow).enumerate() {
                let dx = &mut dx[i * h / oh * w..][..w];
                dy.iter().zip(&columns).for_each(|(dy, &j)| dx[j] += dy);
            }
        });
        Ok(dx)
    }
}
