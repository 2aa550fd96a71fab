//! Launches `softmax.cu`: over rows of any tensor, and over the scores of attention.

use super::{Arg, Buffer, Computed, CudaDevice, DType, Grid, Result, Tensor, View, flag, int, launch};

pub(in crate::ops) fn softmax(x: &Tensor) -> Result<Computed> {
    let (device, cols) = (x.device().as_cuda_device()?, x.dims().last().copied().unwrap_or(1));
    let input = View::of(x)?;
    let y = Buffer::new(device, x.dims(), x.dtype())?;
    let grid = Grid::rows(input.len / cols.max(1), cols);
    launch(device, ("softmax", x.dtype(), "softmax"), grid, &[input.arg(), y.arg(), int(cols)])?;
    Ok(y.computed())
}

pub(in crate::ops) fn softmax_backward(y: &Tensor, dy: &Tensor) -> Result<Computed> {
    let (device, cols) = (y.device().as_cuda_device()?, y.dims().last().copied().unwrap_or(1));
    let (output, dy) = (View::of(y)?, View::of(dy)?);
    let dx = Buffer::new(device, y.dims(), y.dtype())?;
    let grid = Grid::rows(output.len / cols.max(1), cols);
    let args = [output.arg(), dy.arg(), dx.arg(), int(cols)];
    launch(device, ("softmax", y.dtype(), "softmax_bwd"), grid, &args)?;
    Ok(dx.computed())
}

/// Scores `[N, n, S]` of queries that begin at number `first`, f32, to probabilities of `dtype`.
pub(super) fn probabilities(
    device: &CudaDevice,
    scores: Buffer,
    dtype: DType,
    first: usize,
    scale: f32,
    causal: bool,
) -> Result<Buffer> {
    let (heads, n, s) = scores.shape.dims3()?;
    let args = [int(s), int(n), int(first), Arg::Float(scale), flag(causal)];
    in_place_or_new(device, scores, dtype, |scores, p| {
        let args = [&[scores, p], &args[..]].concat();
        launch(device, ("softmax", dtype, "attention_softmax"), Grid::rows(heads * n, s), &args)
    })
}

/// Gradient of the probabilities `p`, f32, to the gradient of `q k^T`, of the dtype of `p`.
pub(super) fn scores_gradient(device: &CudaDevice, p: &Buffer, dp: Buffer, scale: f32) -> Result<Buffer> {
    let (heads, n, s) = dp.shape.dims3()?;
    in_place_or_new(device, dp, p.dtype, |dp, ds| {
        let args = [p.arg(), dp, ds, int(s), Arg::Float(scale)];
        launch(device, ("softmax", p.dtype, "attention_softmax_bwd"), Grid::rows(heads * n, s), &args)
    })
}

/// The result of `fill(from, to)`, which may write over an f32 input if the result is f32 too.
fn in_place_or_new(
    device: &CudaDevice,
    from: Buffer,
    dtype: DType,
    fill: impl FnOnce(Arg, Arg) -> Result<()>,
) -> Result<Buffer> {
    if from.dtype == dtype {
        fill(from.arg(), from.arg())?;
        return Ok(from);
    }
    let to = Buffer::new(device, from.shape.clone(), dtype)?;
    fill(from.arg(), to.arg())?;
    Ok(to)
}
