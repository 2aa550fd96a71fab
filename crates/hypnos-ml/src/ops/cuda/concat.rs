//! Launches `concat.cu`: two tensors joined in their second dimension, and the way back.

use super::{Buffer, Computed, Grid, Result, Tensor, View, int, launch, long};

/// `a` and `b`, contiguous, joined to `shape`.
pub(in crate::ops) fn concat(
    a: &Tensor,
    b: &Tensor,
    shape: (usize, usize, usize, usize),
) -> Result<Computed> {
    let device = a.device().as_cuda_device()?;
    let y = Buffer::new(device, shape, a.dtype())?;
    let (rows, a, b) = (shape.0.max(1), View::of(a)?, View::of(b)?);
    let args = [a.arg(), b.arg(), y.arg(), long(y.len()), int(a.len / rows), int(b.len / rows)];
    launch(device, ("concat", a.dtype, "concat"), Grid::any(y.len().div_ceil(4)), &args)?;
    Ok(y.computed())
}

/// The gradients of those that are tracked.
pub(in crate::ops) fn concat_backward(dy: &Tensor, a: &Tensor, b: &Tensor) -> Result<[Option<Tensor>; 2]> {
    let device = dy.device().as_cuda_device()?;
    let (rows, grad) = (dy.dim(0)?.max(1), View::of(dy)?);
    let gradient =
        |of: &Tensor| of.track_op().then(|| Buffer::new(device, of.dims(), dy.dtype())).transpose();
    let (da, db) = (gradient(a)?, gradient(b)?);
    let place = |buffer: &Option<Buffer>| buffer.as_ref().map_or(super::Arg::Address(0), Buffer::arg);
    let (n_a, n_b) = (a.elem_count() / rows, b.elem_count() / rows);
    let args = [grad.arg(), place(&da), place(&db), long(grad.len), int(n_a), int(n_b)];
    launch(device, ("concat", dy.dtype(), "concat_bwd"), Grid::any(grad.len.div_ceil(4)), &args)?;
    Ok([da, db].map(|buffer| buffer.map(Buffer::tensor)))
}
