//! Launches `norm.cu`: layer norm and group norm.
//!
//! Mean and deviation are not kept between forward and backward: a pass over the input makes them again.

use super::{
    Arg, Buffer, Computed, CudaDevice, DType, Grid, Result, Tensor, View, flag, int, launch, reduce,
};
use crate::ops::group_norm::Norm;
use crate::param::Param;

/// Elements of a group's part, and of a plane's cut, that one block works on.
const ELEMENTS_PER_BLOCK: usize = 8192;

/// Mean and reciprocal deviation of each run of `len` elements; f32.
struct Statistics {
    mean: Buffer,
    rstd: Buffer,
}

impl Statistics {
    fn of(device: &CudaDevice, x: &View, len: usize, eps: f64) -> Result<Self> {
        let (runs, n_parts) = (x.len / len.max(1), len.div_ceil(ELEMENTS_PER_BLOCK).max(1));
        let buffer = |n| Buffer::new(device, n, DType::F32);
        let (means, deviations) = (buffer(runs * n_parts)?, buffer(runs * n_parts)?);
        let args = [x.arg(), means.arg(), deviations.arg(), int(len), int(n_parts)];
        let grid = Grid::rows(runs * n_parts, len.div_ceil(n_parts));
        launch(device, ("norm", x.dtype, "group_norm_parts"), grid, &args)?;
        let all = Self { mean: buffer(runs)?, rstd: buffer(runs)? };
        let (mean, rstd) = (all.mean.arg(), all.rstd.arg());
        let sizes = [int(runs), int(len), int(n_parts), Arg::Float(eps as f32)];
        let args = [&[means.arg(), deviations.arg(), mean, rstd][..], &sizes].concat();
        launch(device, ("norm", x.dtype, "group_norm_stats"), Grid::any(runs), &args)?;
        Ok(all)
    }
}

pub(in crate::ops) fn layer_norm(x: &Tensor, weight: &Param, bias: &Param, eps: f64) -> Result<Computed> {
    let device = x.device().as_cuda_device()?;
    let (weight, bias) = (weight.value(), bias.value());
    let (input, weight, bias) = (View::of(x)?, View::of(&weight)?, View::of(&bias)?);
    let (cols, rows) = (weight.len, input.len / weight.len.max(1));
    let y = Buffer::new(device, x.dims(), x.dtype())?;
    let (mean, rstd) = (Buffer::new(device, rows, DType::F32)?, Buffer::new(device, rows, DType::F32)?);
    let args = [input.arg(), weight.arg(), bias.arg(), y.arg(), mean.arg(), rstd.arg(), int(cols)];
    let args = [&args[..], &[Arg::Float(eps as f32)]].concat();
    launch(device, ("norm", x.dtype(), "layer_norm"), Grid::rows(rows, cols), &args)?;
    Ok(y.computed())
}

pub(in crate::ops) fn layer_norm_backward(
    x: &Tensor,
    dy: &Tensor,
    weight: &Param,
    bias: &Param,
    eps: f64,
) -> Result<Option<Tensor>> {
    let device = x.device().as_cuda_device()?;
    let value = weight.value();
    let (input, dy, w) = (View::of(x)?, View::of(dy)?, View::of(&value)?);
    let (cols, rows) = (w.len, input.len / w.len.max(1));
    let Statistics { mean, rstd } = Statistics::of(device, &input, cols, eps)?;
    if weight.is_trainable() || bias.is_trainable() {
        let (n, grid) = reduce::parts(rows, cols);
        let parts = || Buffer::new(device, (n, cols), DType::F32);
        let (dw, db) = (parts()?, parts()?);
        let args = [input.arg(), dy.arg(), mean.arg(), rstd.arg(), dw.arg(), db.arg()];
        let args = [&args[..], &[int(rows), int(cols), reduce::rows_per_part()]].concat();
        launch(device, ("norm", x.dtype(), "layer_norm_bwd_params"), grid, &args)?;
        add_grads(device, [(weight, &dw), (bias, &db)], n, cols)?;
    }
    if !x.track_op() {
        return Ok(None);
    }
    let dx = Buffer::new(device, x.dims(), x.dtype())?;
    let args = [input.arg(), dy.arg(), w.arg(), mean.arg(), rstd.arg(), dx.arg(), int(cols)];
    launch(device, ("norm", x.dtype(), "layer_norm_bwd"), Grid::rows(rows, cols), &args)?;
    Ok(Some(dx.tensor()))
}

/// Joins the parts `[n, cols]` of the trained ones' gradients.
fn add_grads(device: &CudaDevice, grads: [(&Param, &Buffer); 2], n: usize, cols: usize) -> Result<()> {
    for (param, parts) in grads.into_iter().filter(|(param, _)| param.is_trainable()) {
        param.add_grad(reduce::join(device, parts, n, cols)?)?;
    }
    Ok(())
}

impl Norm {
    fn group(&self) -> usize {
        self.c / self.n_groups * self.spatial
    }

    /// Into how many pieces each plane is cut.
    fn cuts(&self) -> usize {
        self.spatial.div_ceil(ELEMENTS_PER_BLOCK).max(1)
    }

    /// One block per piece of each of `n_planes`.
    fn grid(&self, n_planes: usize) -> Grid {
        Grid::rows(n_planes * self.cuts(), self.spatial.div_ceil(self.cuts()))
    }

    /// The sizes that the kernels end with.
    fn sizes(&self) -> [Arg; 5] {
        [int(self.c), int(self.n_groups), int(self.spatial), int(self.cuts()), flag(self.silu)]
    }
}

pub(in crate::ops) fn group_norm(x: &Tensor, weight: &Param, bias: &Param, norm: &Norm) -> Result<Computed> {
    let device = x.device().as_cuda_device()?;
    let (weight, bias) = (weight.value(), bias.value());
    let (input, weight, bias) = (View::of(x)?, View::of(&weight)?, View::of(&bias)?);
    let Statistics { mean, rstd } = Statistics::of(device, &input, norm.group(), norm.eps)?;
    let y = Buffer::new(device, x.dims(), x.dtype())?;
    let args = [input.arg(), mean.arg(), rstd.arg(), weight.arg(), bias.arg(), y.arg()];
    let grid = norm.grid(input.len / norm.spatial.max(1));
    launch(device, ("norm", x.dtype(), "group_norm"), grid, &[&args[..], &norm.sizes()].concat())?;
    Ok(y.computed())
}

pub(in crate::ops) fn group_norm_backward(
    x: &Tensor,
    dy: &Tensor,
    weight: &Param,
    bias: &Param,
    norm: &Norm,
) -> Result<Option<Tensor>> {
    let device = x.device().as_cuda_device()?;
    let (w, b) = (weight.value(), bias.value());
    let (input, dy, w, b) = (View::of(x)?, View::of(dy)?, View::of(&w)?, View::of(&b)?);
    let n_planes = input.len / norm.spatial.max(1);
    let Statistics { mean, rstd } = Statistics::of(device, &input, norm.group(), norm.eps)?;
    // Per plane, the sums of g and of g x_hat: everything else comes from them.
    let (g, gx) = (Buffer::new(device, n_planes, DType::F32)?, Buffer::new(device, n_planes, DType::F32)?);
    let inputs = [input.arg(), dy.arg(), mean.arg(), rstd.arg(), w.arg(), b.arg(), g.arg(), gx.arg()];
    let sizes = [int(norm.c), int(norm.n_groups), int(norm.spatial), flag(norm.silu)];
    let args = [&inputs[..], &sizes].concat();
    let grid = Grid::rows(n_planes, norm.spatial);
    launch(device, ("norm", x.dtype(), "group_norm_bwd_sums"), grid, &args)?;
    add_grads(device, [(weight, &gx), (bias, &g)], n_planes / norm.c, norm.c)?;
    if !x.track_op() {
        return Ok(None);
    }
    let dx = Buffer::new(device, x.dims(), x.dtype())?;
    let args = [&inputs[..], &[dx.arg()], &norm.sizes()].concat();
    launch(device, ("norm", x.dtype(), "group_norm_bwd"), norm.grid(n_planes), &args)?;
    Ok(Some(dx.tensor()))
}
