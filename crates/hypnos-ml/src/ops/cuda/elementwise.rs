//! Launches `elementwise.cu`: activations, GEGLU, biases.

use super::{Buffer, Computed, CudaDevice, Grid, Result, Tensor, View, bail, int, launch, long, optional};
use crate::ops::activation::Activation;

/// The number that the kernel knows an activation by.
fn kind(activation: Activation) -> super::Arg {
    match activation {
        Activation::Silu => int(0),
        Activation::Gelu => int(1),
        Activation::QuickGelu => int(2),
    }
}

pub(in crate::ops) fn activation(x: &Tensor, activation: Activation) -> Result<Computed> {
    let (device, input) = (x.device().as_cuda_device()?, View::of(x)?);
    let y = Buffer::new(device, x.dims(), x.dtype())?;
    let args = [input.arg(), y.arg(), long(input.len), kind(activation)];
    launch(device, ("elementwise", x.dtype(), "activate"), Grid::any(input.len.div_ceil(4)), &args)?;
    Ok(y.computed())
}

pub(in crate::ops) fn activation_backward(
    x: &Tensor,
    dy: &Tensor,
    activation: Activation,
) -> Result<Computed> {
    let (device, input, dy) = (x.device().as_cuda_device()?, View::of(x)?, View::of(dy)?);
    let dx = Buffer::new(device, x.dims(), x.dtype())?;
    let args = [input.arg(), dy.arg(), dx.arg(), long(input.len), kind(activation)];
    launch(device, ("elementwise", x.dtype(), "activate_bwd"), Grid::any(input.len.div_ceil(4)), &args)?;
    Ok(dx.computed())
}

pub(in crate::ops) fn geglu(x: &Tensor, shape: Vec<usize>) -> Result<Computed> {
    let (device, input) = (x.device().as_cuda_device()?, View::of(x)?);
    let cols = *shape.last().unwrap_or(&0);
    let y = Buffer::new(device, shape, x.dtype())?;
    let args = [input.arg(), y.arg(), long(y.len()), int(cols)];
    launch(device, ("elementwise", x.dtype(), "geglu"), Grid::any(y.len()), &args)?;
    Ok(y.computed())
}

pub(in crate::ops) fn geglu_backward(x: &Tensor, dy: &Tensor) -> Result<Computed> {
    let (device, cols) = (x.device().as_cuda_device()?, *dy.dims().last().unwrap_or(&0));
    let (input, dy) = (View::of(x)?, View::of(dy)?);
    let dx = Buffer::new(device, x.dims(), x.dtype())?;
    let args = [input.arg(), dy.arg(), dx.arg(), long(dy.len), int(cols)];
    launch(device, ("elementwise", x.dtype(), "geglu_bwd"), Grid::any(dy.len), &args)?;
    Ok(dx.computed())
}

/// Adds `bias` `[C]`, f32, to `y` `[.., C, inner]` in place, and `more`, which is as large as `y`.
pub(super) fn add_bias(
    device: &CudaDevice,
    y: &Buffer,
    (bias, more): (Option<&Tensor>, Option<&View>),
    inner: usize,
) -> Result<()> {
    if bias.is_none() && more.is_none() {
        return Ok(());
    }
    if let Some(more) = more.filter(|more| more.dtype != y.dtype || more.len != y.len()) {
        bail!("wanted {} numbers in {:?} to add, got {} in {:?}", y.len(), y.dtype, more.len, more.dtype);
    }
    let bias = bias.map(View::of).transpose()?;
    let channels = bias.as_ref().map_or(1, |bias| bias.len);
    let added = [optional(bias.as_ref()), optional(more)];
    let args = [&[y.arg()][..], &added, &[y.arg(), long(y.len()), int(inner), int(channels)]].concat();
    launch(device, ("elementwise", y.dtype, "add_bias"), Grid::any(y.len().div_ceil(4)), &args)
}
