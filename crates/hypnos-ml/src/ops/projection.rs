//! Dense layers between pictures `[B, C, h, w]` and tokens `[B, h w, C]`: on a GPU as products that read or write the
//! picture as it lies, on the CPU with a copy.

#[cfg(feature = "cuda")]
use candle_core::bail;
use candle_core::{Result, Tensor};

#[cfg(feature = "cuda")]
use super::custom_op::{custom_op, trained_tag};
use super::linear;
use crate::dry_run::DryTensor;
use crate::param::Param;

/// `[B, C, h, w]` to `[B, h w, C]`.
pub(crate) fn to_tokens(x: &Tensor) -> Result<Tensor> {
    x.flatten_from(2)?.transpose(1, 2)?.contiguous()
}

/// `[B, h w, C]` to `[B, C, h, w]`.
fn to_picture(x: &Tensor, h: usize, w: usize) -> Result<Tensor> {
    let (b, _, c) = x.dims3()?;
    x.transpose(1, 2)?.contiguous()?.reshape((b, c, h, w))
}

/// [`linear`](super::linear()) of a picture's places.
///
/// * `x` `[B, C, h, w]`
/// * `weight` `[O, C]`, or `[O, C, 1, 1]` as old checkpoints have it; `bias` `[O]`
///
/// Gives `[B, h w, O]`. Differentiable in all three.
pub fn picture_to_tokens(x: &Tensor, weight: &Param, bias: Option<&Param>) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return picture_to_tokens_on_gpu(&x.contiguous()?, weight, bias);
    }
    linear::linear(&to_tokens(x)?, weight, bias)
}

#[cfg(feature = "cuda")]
fn picture_to_tokens_on_gpu(x: &Tensor, weight: &Param, bias: Option<&Param>) -> Result<Tensor> {
    let ((_, c, ..), dims) = (x.dims4()?, weight.dims());
    if dims[1] != c {
        bail!("{}: {dims:?} does not fit inputs {:?}", weight.name(), x.dims());
    }
    let value = super::cuda::picture_to_tokens(x, weight, bias)?;
    let tag = trained_tag(weight, bias);
    let (weight, bias, input) = (weight.clone(), bias.cloned(), x.clone());
    custom_op("picture_to_tokens", &[x, &tag], value, move |dy| {
        Ok([super::cuda::picture_to_tokens_backward(&input, dy, &weight, bias.as_ref())?, None, None])
    })
}

/// `residual` plus the [`linear`](super::linear()) of tokens, as a picture.
///
/// * `residual` `[B, O, h, w]`; `x` `[B, h w, C]`
/// * `weight` and `bias` as for [`picture_to_tokens`]
///
/// Gives `[B, O, h, w]`. Differentiable in all four.
pub fn tokens_to_picture(
    residual: &Tensor,
    x: &Tensor,
    weight: &Param,
    bias: Option<&Param>,
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return tokens_to_picture_on_gpu(&residual.contiguous()?, &x.contiguous()?, weight, bias);
    }
    let (.., h, w) = residual.dims4()?;
    residual + to_picture(&linear::linear(x, weight, bias)?, h, w)?
}

#[cfg(feature = "cuda")]
fn tokens_to_picture_on_gpu(
    residual: &Tensor,
    x: &Tensor,
    weight: &Param,
    bias: Option<&Param>,
) -> Result<Tensor> {
    let ((b, o, h, w), dims) = (residual.dims4()?, weight.dims());
    if x.dims() != [b, h * w, dims[1]] || dims[0] != o {
        bail!("{}: {dims:?} does not lead from {:?} to {:?}", weight.name(), x.dims(), residual.dims());
    }
    let value = super::cuda::tokens_to_picture(residual, x, weight, bias)?;
    let (tag, adds) = (trained_tag(weight, bias), residual.track_op());
    let (weight, bias, input) = (weight.clone(), bias.cloned(), x.clone());
    custom_op("tokens_to_picture", &[x, &tag, residual], value, move |dy| {
        let dx = super::cuda::tokens_to_picture_backward(&input, dy, &weight, bias.as_ref())?;
        Ok([dx, None, adds.then(|| dy.clone())])
    })
}

/// [`picture_to_tokens()`] in a dry run.
pub(crate) fn dry_to_tokens(x: &DryTensor, weight: &Param, bias: Option<&Param>) -> DryTensor {
    let [b, c, h, w] = [0, 1, 2, 3].map(|axis| x.dims()[axis]);
    if !x.meter().on_gpu() {
        let tokens = x.reshape(&[b, c, h * w]).transpose(1, 2).contiguous();
        return linear::dry(&tokens, weight, bias);
    }
    let x = x.contiguous();
    x.custom(&[&x], &[b, h * w, weight.dims()[0]], linear::cost(b * h * w, weight, bias))
}

/// [`tokens_to_picture()`] in a dry run.
pub(crate) fn dry_to_picture(
    residual: &DryTensor,
    x: &DryTensor,
    weight: &Param,
    bias: Option<&Param>,
) -> DryTensor {
    if !x.meter().on_gpu() {
        let y = linear::dry(x, weight, bias);
        return residual.plus(&y.transpose(1, 2).contiguous().reshape(residual.dims()));
    }
    let (x, residual) = (x.contiguous(), residual.contiguous());
    let n_rows = x.dims()[0] * x.dims()[1];
    x.custom(&[&x, &residual], residual.dims(), linear::cost(n_rows, weight, bias))
}
