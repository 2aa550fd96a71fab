//! Launches `norm.cu`: layer norm and group norm.
//!
//! The forward keeps the mean and the reciprocal standard deviation for the backward: eight bytes for each row or group.

use super::{
    Arg, Buffer, Computed, CudaDevice, DType, Grid, Result, Tensor, View, flag, int, launch, optional, reduce,
};
use crate::ops::group_norm::Norm;
use crate::param::Param;

/// Elements of a group's part, and of a plane's cut, that one block works on.
const ELEMENTS_PER_BLOCK: usize = 8192;

/// Most elements of a group that one block normalises by itself. It reads them three times, the second and third time from
/// the cache if they fit, and saves a launch. Chosen without a measurement on a GPU.
const WHOLE_GROUP_MOST: usize = 49152;

/// Mean and reciprocal standard deviation of each row or group; f32.
pub(in crate::ops) struct Statistics {
    mean: Buffer,
    rstd: Buffer,
}

impl Statistics {
    /// Of `n` runs; a kernel fills them.
    fn new(device: &CudaDevice, n: usize) -> Result<Self> {
        Ok(Self { mean: Buffer::new(device, n, DType::F32)?, rstd: Buffer::new(device, n, DType::F32)? })
    }

    fn args(&self) -> [Arg; 2] {
        [self.mean.arg(), self.rstd.arg()]
    }
}

/// The value, and what [`layer_norm_backward`] wants of it.
pub(in crate::ops) fn layer_norm(
    x: &Tensor,
    weight: &Param,
    bias: &Param,
    eps: f64,
) -> Result<(Computed, Statistics)> {
    let device = x.device().as_cuda_device()?;
    let (weight, bias) = (weight.value(), bias.value());
    let (input, weight, bias) = (View::of(x)?, View::of(&weight)?, View::of(&bias)?);
    let (cols, rows) = (weight.len, input.len / weight.len.max(1));
    let (y, statistics) = (Buffer::new(device, x.dims(), x.dtype())?, Statistics::new(device, rows)?);
    let args = [&[input.arg(), weight.arg(), bias.arg(), y.arg()][..], &statistics.args()].concat();
    let args = [&args[..], &[int(cols), Arg::Float(eps as f32)]].concat();
    launch(device, ("norm", x.dtype(), "layer_norm"), Grid::rows(rows, cols), &args)?;
    Ok((y.computed(), statistics))
}

pub(in crate::ops) fn layer_norm_backward(
    x: &Tensor,
    dy: &Tensor,
    weight: &Param,
    bias: &Param,
    statistics: &Statistics,
) -> Result<Option<Tensor>> {
    let device = x.device().as_cuda_device()?;
    let value = weight.value();
    let (input, dy, w) = (View::of(x)?, View::of(dy)?, View::of(&value)?);
    let (cols, rows) = (w.len, input.len / w.len.max(1));
    let [mean, rstd] = statistics.args();
    if weight.is_trainable() || bias.is_trainable() {
        let (n, grid) = reduce::parts(rows, cols);
        let parts = Buffer::new(device, (2, n, cols), DType::F32)?;
        let args = [input.arg(), dy.arg(), mean, rstd, parts.arg(), second(&parts)];
        let args = [&args[..], &[int(rows), int(cols), reduce::rows_per_part()]].concat();
        launch(device, ("norm", x.dtype(), "layer_norm_bwd_params"), grid, &args)?;
        add_grads(device, [weight, bias], parts)?;
    }
    if !x.track_op() {
        return Ok(None);
    }
    let dx = Buffer::new(device, x.dims(), x.dtype())?;
    let args = [input.arg(), dy.arg(), w.arg(), mean, rstd, dx.arg(), int(cols)];
    launch(device, ("norm", x.dtype(), "layer_norm_bwd"), Grid::rows(rows, cols), &args)?;
    Ok(Some(dx.tensor()))
}

/// The second half of a buffer of f32.
fn second(buffer: &Buffer) -> Arg {
    Arg::Address(buffer.address + (buffer.len() / 2 * size_of::<f32>()) as u64)
}

/// Joins the parts of two weights' gradients, `[2, n, cols]`.
fn add_grads(device: &CudaDevice, params: [&Param; 2], parts: Buffer) -> Result<()> {
    if !params.iter().any(|param| param.is_trainable()) {
        return Ok(());
    }
    let sums = reduce::join(device, parts)?;
    for (i, param) in params.into_iter().enumerate() {
        param.add_grad(sums.get(i)?)?;
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

/// The value, and what [`group_norm_backward`] wants of it. `shift` `[B, C]`, whose rows may be parts of longer ones, is
/// added to `x` first.
pub(in crate::ops) fn group_norm(
    x: &Tensor,
    shift: Option<&Tensor>,
    weight: &Param,
    bias: &Param,
    norm: &Norm,
) -> Result<(Computed, Statistics)> {
    let (device, dtype) = (x.device().as_cuda_device()?, x.dtype());
    let (weight, bias) = (weight.value(), bias.value());
    let (input, weight, bias) = (View::of(x)?, View::of(&weight)?, View::of(&bias)?);
    let (shift, pitch) = shift.map(View::of_rows).transpose()?.unzip();
    let inputs = [input.arg(), optional(shift.as_ref()), int(pitch.unwrap_or(0))];
    let n_groups = input.len / norm.group().max(1);
    let (y, statistics) = (Buffer::new(device, x.dims(), dtype)?, Statistics::new(device, n_groups)?);
    let affine = [weight.arg(), bias.arg(), y.arg()];
    let sizes = [int(norm.c), int(norm.n_groups), int(norm.spatial)];
    let last = [Arg::Float(norm.eps as f32), flag(norm.silu)];
    if norm.group() <= WHOLE_GROUP_MOST {
        let args = [&inputs[..], &affine, &statistics.args(), &sizes, &last].concat();
        let grid = Grid::rows(n_groups, norm.group());
        launch(device, ("norm", dtype, "group_norm_whole"), grid, &args)?;
        return Ok((y.computed(), statistics));
    }
    let n_parts = norm.group().div_ceil(ELEMENTS_PER_BLOCK);
    let parts = Statistics::new(device, n_groups * n_parts)?;
    let args = [int(norm.group()), int(norm.spatial), int(norm.n_groups), int(n_parts)];
    let args = [&inputs[..], &parts.args(), &args].concat();
    let grid = Grid::rows(n_groups * n_parts, ELEMENTS_PER_BLOCK);
    launch(device, ("norm", dtype, "group_norm_parts"), grid, &args)?;
    let cuts = [int(norm.cuts()), int(n_parts)];
    let args = [&inputs[..], &parts.args(), &affine, &statistics.args(), &sizes, &cuts, &last].concat();
    launch(device, ("norm", dtype, "group_norm"), norm.grid(input.len / norm.spatial), &args)?;
    Ok((y.computed(), statistics))
}

/// The gradients of `x` and of `shift`, of those that are tracked.
pub(in crate::ops) fn group_norm_backward(
    (x, shift): (&Tensor, Option<&Tensor>),
    dy: &Tensor,
    weight: &Param,
    bias: &Param,
    norm: &Norm,
    statistics: &Statistics,
) -> Result<[Option<Tensor>; 2]> {
    let (device, dtype) = (x.device().as_cuda_device()?, x.dtype());
    let (w, b) = (weight.value(), bias.value());
    let (input, dy, w, b) = (View::of(x)?, View::of(dy)?, View::of(&w)?, View::of(&b)?);
    let more = shift.map(View::of).transpose()?;
    let n_planes = input.len / norm.spatial.max(1);
    // Per plane, the sums of g and of g x_hat: everything else comes from them.
    let sums = Buffer::new(device, (2, n_planes / norm.c, norm.c), DType::F32)?;
    let inputs = [&[input.arg(), optional(more.as_ref()), dy.arg()][..], &statistics.args()].concat();
    let inputs = [&inputs[..], &[w.arg(), b.arg(), sums.arg(), second(&sums)]].concat();
    let sizes = [int(norm.c), int(norm.n_groups), int(norm.spatial), flag(norm.silu)];
    let args = [&inputs[..], &sizes].concat();
    let grid = Grid::rows(n_planes, norm.spatial);
    launch(device, ("norm", dtype, "group_norm_bwd_sums"), grid, &args)?;
    let of_shift = shift.filter(|shift| shift.track_op());
    if !x.track_op() && of_shift.is_none() {
        add_grads(device, [bias, weight], sums)?;
        return Ok([None, None]);
    }
    let dx = Buffer::new(device, x.dims(), dtype)?;
    let args = [&inputs[..], &[dx.arg()], &norm.sizes()].concat();
    launch(device, ("norm", dtype, "group_norm_bwd"), norm.grid(n_planes), &args)?;
    add_grads(device, [bias, weight], sums)?;
    let dx = dx.tensor();
    let to_shift = |shift: &Tensor| {
        reduce::plane_sums(device, &View::of(&dx)?, norm.spatial)?
            .tensor()
            .reshape(shift.dims())?
            .to_dtype(dtype)
    };
    let dshift = of_shift.map(to_shift).transpose()?;
    Ok([x.track_op().then_some(dx), dshift])
}
