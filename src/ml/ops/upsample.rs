//! Nearest-neighbour enlargement to any size.

use candle_core::{Device, Result, Tensor, bail};
use rayon::prelude::*;

use super::cpu::{View, zeros};
use super::graft::{Computed, graft};

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
    graft("upsample_nearest", &[&x], value, move |dy| {
        let dx = match dy.device() {
            Device::Cpu => Computed::cpu(resize.backward(dy)?, (b, c, h, w)),
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => super::cuda::upsample_backward(dy, &resize)?,
            other => bail!("upsample_nearest: no kernel for {other:?}"),
        };
        Ok([Some(dx.detached()), None, None])
    })
}

/// Heights and widths.
#[derive(Clone, Copy)]
pub(super) struct Resize {
    pub from: (usize, usize),
    pub to: (usize, usize),
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
