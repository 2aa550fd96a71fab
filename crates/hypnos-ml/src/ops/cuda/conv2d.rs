//! Convolution: 1x1 as a matrix product, others by cuDNN, or as products with unfolded patches where the program was
//! built without cuDNN or cuDNN has no algorithm for the shape.

use super::elementwise::add_bias;
use super::matmul::{Mat, Size, product};
use super::reduce::channel_sums;
use super::spatial::{gather, scatter};
use super::{Buffer, Computed, CudaDevice, DType, Result, Tensor, View};
use crate::ops::conv2d::Conv;
use crate::ops::cpu::Into;
use crate::param::Param;

/// The convolution with `bias` and `more`, which is as large as the result.
pub(in crate::ops) fn conv2d(
    x: &Tensor,
    weight: &Param,
    bias: Option<&Param>,
    more: Option<&Tensor>,
    conv: &Conv,
) -> Result<Computed> {
    let device = x.device().as_cuda_device()?;
    let weight = weight.weight(x.dtype())?;
    #[cfg(feature = "cudnn")]
    if !conv.is_pointwise()
        && let Some(bias) = bias
        && let Some(y) = super::cudnn::value_plus(x, &weight, (&bias.weight(x.dtype())?, more), conv)?
    {
        return Ok(y.computed());
    }
    let y = value(device, x, &weight, conv)?;
    let more = more.map(View::of).transpose()?;
    let bias = bias.map(Param::value);
    add_bias(device, &y, (bias.as_ref(), more.as_ref()), conv.spatial())?;
    Ok(y.computed())
}

pub(in crate::ops) fn conv2d_backward(
    x: &Tensor,
    dy: &Tensor,
    weight: &Param,
    bias: Option<&Param>,
    conv: &Conv,
) -> Result<Option<Tensor>> {
    let device = x.device().as_cuda_device()?;
    if let Some(bias) = bias.filter(|bias| bias.is_trainable()) {
        bias.add_grad(channel_sums(device, &View::of(dy)?, conv.o, conv.spatial())?)?;
    }
    if weight.is_trainable() {
        weight.add_grad(weight_gradient(device, x, dy, conv)?)?;
    }
    if !x.track_op() {
        return Ok(None);
    }
    let dx = input_gradient(device, dy, &weight.weight(x.dtype())?, conv)?;
    Ok(Some(dx.tensor()))
}

/// The convolution without its bias.
fn value(device: &CudaDevice, x: &Tensor, weight: &Tensor, conv: &Conv) -> Result<Buffer> {
    #[cfg(feature = "cudnn")]
    if !conv.is_pointwise()
        && let Some(y) = super::cudnn::value(x, weight, conv)?
    {
        return Ok(y);
    }
    let (x, weight) = (View::of(x)?, View::of(weight)?);
    let (o, k, p) = (conv.o, conv.patch(), conv.spatial());
    let y = Buffer::new(device, conv.out_dims(), x.dtype)?;
    let weight = Mat::view(&weight, k);
    if conv.is_pointwise() {
        let size = Size { batch: conv.b, m: o, n: p, k };
        let factors = (weight, Mat::view(&x, p).every(k * p));
        product(device, Mat::buffer(&y, p).every(o * p), Into::Replace, size, factors)?;
        return Ok(y);
    }
    let columns = Buffer::new(device, (k, p), x.dtype)?;
    for image in 0..conv.b {
        gather(device, &x, image, &columns, conv)?;
        let to = Mat::buffer(&y, p).at(image * o * p);
        product(device, to, Into::Replace, Size::one(o, p, k), (weight, Mat::buffer(&columns, p)))?;
    }
    Ok(y)
}

/// The gradient of the weight, f32. Of bf16 inputs it is summed in f32 by products with unfolded patches, for cuDNN would
/// round the sum.
fn weight_gradient(device: &CudaDevice, x: &Tensor, dy: &Tensor, conv: &Conv) -> Result<Tensor> {
    #[cfg(feature = "cudnn")]
    if !conv.is_pointwise()
        && x.dtype() == DType::F32
        && let Some(dw) = super::cudnn::weight_gradient(x, dy, conv)?
    {
        return Ok(dw.tensor());
    }
    let (x, dy) = (View::of(x)?, View::of(dy)?);
    let (o, k, p) = (conv.o, conv.patch(), conv.spatial());
    let dw = Buffer::new(device, (o, conv.c, conv.kh, conv.kw), DType::F32)?;
    let columns = if conv.is_pointwise() { None } else { Some(Buffer::new(device, (k, p), x.dtype)?) };
    for image in 0..conv.b {
        let patches = match &columns {
            None => Mat::view(&x, p).at(image * k * p),
            Some(columns) => {
                gather(device, &x, image, columns, conv)?;
                Mat::buffer(columns, p)
            }
        };
        let factors = (Mat::view(&dy, p).at(image * o * p), patches.t());
        let into = if image == 0 { Into::Replace } else { Into::Add };
        product(device, Mat::buffer(&dw, k), into, Size::one(o, k, p), factors)?;
    }
    Ok(dw.tensor())
}

/// The gradient of the input.
fn input_gradient(device: &CudaDevice, dy: &Tensor, weight: &Tensor, conv: &Conv) -> Result<Buffer> {
    #[cfg(feature = "cudnn")]
    if !conv.is_pointwise()
        && let Some(dx) = super::cudnn::input_gradient(dy, weight, conv)?
    {
        return Ok(dx);
    }
    let (dy, weight) = (View::of(dy)?, View::of(weight)?);
    let (o, k, p) = (conv.o, conv.patch(), conv.spatial());
    let dx = Buffer::new(device, (conv.b, conv.c, conv.h, conv.w), dy.dtype)?;
    let weight = Mat::view(&weight, k).t();
    if conv.is_pointwise() {
        let size = Size { batch: conv.b, m: k, n: p, k: o };
        let factors = (weight, Mat::view(&dy, p).every(o * p));
        product(device, Mat::buffer(&dx, p).every(k * p), Into::Replace, size, factors)?;
        return Ok(dx);
    }
    let columns = Buffer::new(device, (k, p), dy.dtype)?;
    for image in 0..conv.b {
        let dy = Mat::view(&dy, p).at(image * o * p);
        product(device, Mat::buffer(&columns, p), Into::Replace, Size::one(k, p, o), (weight, dy))?;
        scatter(device, &columns, &dx, image, conv)?;
    }
    Ok(dx)
}
