//! Launches `spatial.cu`: nearest upsampling, depthwise convolution, and the patches behind a convolution.

use candle_core::cuda_backend::cudarc::driver::DeviceRepr;

use super::elementwise::add_bias;
use super::reduce::channel_sums;
use super::{Arg, Buffer, Computed, CudaDevice, DType, Grid, Result, Tensor, View, bail, int, launch, long};
use crate::ops::conv2d::{Conv, Conv2dSpec};
use crate::ops::depthwise::Depthwise;
use crate::ops::upsample::Resize;
use crate::param::Param;

pub(in crate::ops) fn upsample(x: &Tensor, resize: &Resize) -> Result<Computed> {
    let (device, (b, c, ..)) = (x.device().as_cuda_device()?, x.dims4()?);
    let input = View::of(x)?;
    let y = Buffer::new(device, (b, c, resize.to.0, resize.to.1), x.dtype())?;
    let args = [input.arg(), y.arg(), long(y.len())];
    let args = [&args[..], &sizes(resize)].concat();
    launch(device, ("spatial", x.dtype(), "upsample"), Grid::any(y.len()), &args)?;
    Ok(y.computed())
}

pub(in crate::ops) fn upsample_backward(dy: &Tensor, resize: &Resize) -> Result<Computed> {
    let (device, (b, c, ..)) = (dy.device().as_cuda_device()?, dy.dims4()?);
    let grad = View::of(dy)?;
    let dx = Buffer::new(device, (b, c, resize.from.0, resize.from.1), dy.dtype())?;
    let args = [&[grad.arg(), dx.arg(), long(dx.len())][..], &sizes(resize)].concat();
    launch(device, ("spatial", dy.dtype(), "upsample_bwd"), Grid::any(dx.len()), &args)?;
    Ok(dx.computed())
}

fn sizes(resize: &Resize) -> [Arg; 4] {
    [int(resize.from.0), int(resize.from.1), int(resize.to.0), int(resize.to.1)]
}

/// The shape of a convolution window, as `spatial.cu` has it.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct Window {
    h: i32,
    w: i32,
    out_h: i32,
    out_w: i32,
    k_h: i32,
    k_w: i32,
    stride: i32,
    pad_top: i32,
    pad_left: i32,
    dilation: i32,
}

// SAFETY: ten ints in the kernel's order, without padding.
unsafe impl DeviceRepr for Window {}

impl Window {
    fn new(
        from: (usize, usize),
        to: (usize, usize),
        kernel: (usize, usize),
        spec: Conv2dSpec,
    ) -> Result<Self> {
        let sizes = [from.0, from.1, to.0, to.1, kernel.0, kernel.1, spec.stride, spec.before];
        if sizes.iter().any(|&size| size > 1 << 24) {
            bail!("convolution: sizes {sizes:?} are too large for its kernels");
        }
        let [h, w, out_h, out_w, k_h, k_w, stride, before] = sizes.map(|size| size as i32);
        Ok(Self { h, w, out_h, out_w, k_h, k_w, stride, pad_top: before, pad_left: before, dilation: 1 })
    }

    pub(super) fn of(conv: &Conv) -> Result<Self> {
        Self::new((conv.h, conv.w), (conv.oh, conv.ow), (conv.kh, conv.kw), conv.spec)
    }

    fn of_depthwise(conv: &Depthwise) -> Result<Self> {
        Self::new((conv.h, conv.w), (conv.oh, conv.ow), (conv.kh, conv.kw), conv.spec)
    }
}

pub(in crate::ops) fn depthwise(
    x: &Tensor,
    weight: &Param,
    bias: Option<&Param>,
    conv: &Depthwise,
) -> Result<Computed> {
    let (device, weight) = (x.device().as_cuda_device()?, weight.value());
    let (input, weight) = (View::of(x)?, View::of(&weight)?);
    let y = Buffer::new(device, conv.out_dims(), x.dtype())?;
    let window = Arg::Window(Window::of_depthwise(conv)?);
    let args = [input.arg(), weight.arg(), y.arg(), long(y.len()), int(conv.c), window];
    launch(device, ("spatial", x.dtype(), "depthwise"), Grid::any(y.len()), &args)?;
    let bias = bias.map(Param::value);
    add_bias(device, &y, (bias.as_ref(), None), conv.oh * conv.ow)?;
    Ok(y.computed())
}

pub(in crate::ops) fn depthwise_backward(
    x: &Tensor,
    dy: &Tensor,
    weight: &Param,
    bias: Option<&Param>,
    conv: &Depthwise,
) -> Result<Option<Tensor>> {
    let (device, value) = (x.device().as_cuda_device()?, weight.value());
    let (input, grad, w) = (View::of(x)?, View::of(dy)?, View::of(&value)?);
    let window = Arg::Window(Window::of_depthwise(conv)?);
    if let Some(bias) = bias.filter(|bias| bias.is_trainable()) {
        bias.add_grad(channel_sums(device, &grad, conv.c, conv.oh * conv.ow)?)?;
    }
    if weight.is_trainable() {
        let dw = Buffer::new(device, value.dims(), DType::F32)?;
        let args = [input.arg(), grad.arg(), dw.arg(), int(conv.b), int(conv.c), window];
        let grid = Grid::rows(dw.len(), conv.oh * conv.ow);
        launch(device, ("spatial", x.dtype(), "depthwise_bwd_weight"), grid, &args)?;
        weight.add_grad(dw.tensor())?;
    }
    if !x.track_op() {
        return Ok(None);
    }
    let dx = Buffer::new(device, x.dims(), x.dtype())?;
    let args = [grad.arg(), w.arg(), dx.arg(), long(dx.len()), int(conv.c), window];
    launch(device, ("spatial", x.dtype(), "depthwise_bwd"), Grid::any(dx.len()), &args)?;
    Ok(Some(dx.tensor()))
}

/// Unfolds the patches of image `image` of `x` into `columns` `[C kh kw, H' W']`.
pub(super) fn gather(
    device: &CudaDevice,
    x: &View,
    image: usize,
    columns: &Buffer,
    conv: &Conv,
) -> Result<()> {
    let from = Arg::Address(x.address + image_bytes(conv, x.dtype, image));
    let args = [from, columns.arg(), long(columns.len()), Arg::Window(Window::of(conv)?)];
    launch(device, ("spatial", x.dtype, "gather_columns"), Grid::any(columns.len()), &args)
}

/// The transpose of [`gather`]: sums the gradients of patches into image `image` of `dx`.
pub(super) fn scatter(
    device: &CudaDevice,
    columns: &Buffer,
    dx: &Buffer,
    image: usize,
    conv: &Conv,
) -> Result<()> {
    let n = conv.c * conv.h * conv.w;
    let to = Arg::Address(dx.address + image_bytes(conv, dx.dtype, image));
    let args = [columns.arg(), to, long(n), Arg::Window(Window::of(conv)?)];
    launch(device, ("spatial", dx.dtype, "scatter_columns"), Grid::any(n), &args)
}

/// Where image `image` of the input begins.
fn image_bytes(conv: &Conv, dtype: DType, image: usize) -> u64 {
    (image * conv.c * conv.h * conv.w * dtype.size_in_bytes()) as u64
}
