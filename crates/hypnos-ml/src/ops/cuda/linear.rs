//! A dense layer: three matrix products, the first with a bias and what else is added.

use super::elementwise::add_bias;
use super::matmul::{Mat, Size, product, product_and};
use super::reduce::column_sums;
use super::{Buffer, Computed, DType, Result, Tensor, View, bail};
use crate::ops::cpu::Into;
use crate::param::Param;

/// `x W^T + b + more`, where `more` is as large as the result.
pub(in crate::ops) fn linear(
    x: &Tensor,
    weight: &Param,
    bias: Option<&Param>,
    more: Option<&Tensor>,
    shape: Vec<usize>,
) -> Result<Computed> {
    let narrow = bias.map(|bias| bias.weight(x.dtype())).transpose()?;
    Ok(layer(x, &weight.weight(x.dtype())?, narrow.as_ref(), more, shape)?.computed())
}

/// `x W^T + b` of `x` `[B, I]`, `weight` `[O, I]` and `bias` `[O]`, all of one dtype.
pub(in crate::ops) fn linear_of(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let ((rows, n_in), (n_out, wanted)) = (x.dims2()?, weight.dims2()?);
    if n_in != wanted || bias.dims() != [n_out] {
        bail!("linear: {:?} and {:?} do not fit {:?}", weight.dims(), bias.dims(), x.dims());
    }
    Ok(layer(x, weight, Some(bias), None, vec![rows, n_out])?.tensor())
}

fn layer(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    more: Option<&Tensor>,
    shape: Vec<usize>,
) -> Result<Buffer> {
    let device = x.device().as_cuda_device()?;
    let (n_out, n_in) = (weight.dim(0)?, weight.dim(1)?);
    let (x, weight) = (View::of(x)?, View::of(weight)?);
    let (narrow, more) = (bias.map(View::of).transpose()?, more.map(View::of).transpose()?);
    let y = Buffer::new(device, shape, x.dtype)?;
    let to = Mat::buffer(&y, n_out);
    let factors = (Mat::view(&x, n_in), Mat::view(&weight, n_in).t());
    let size = Size::one(x.len / n_in.max(1), n_out, n_in);
    let added = (narrow.as_ref(), more.as_ref());
    if (bias.is_some() || more.is_some()) && product_and(device, to, size, factors, added)? {
        return Ok(y);
    }
    product(device, to, Into::Replace, size, factors)?;
    let bias = bias.map(|bias| bias.to_dtype(DType::F32)).transpose()?;
    add_bias(device, &y, (bias.as_ref(), more.as_ref()), 1)?;
    Ok(y)
}

/// `x` `[.., I]` by each weight of `pack` `[n, O, I]`: the results are parts of one tensor.
pub(in crate::ops) fn linears(x: &Tensor, pack: &Tensor) -> Result<Vec<Tensor>> {
    let (device, (n, n_out, n_in)) = (x.device().as_cuda_device()?, pack.dims3()?);
    let mut shape = [&[n][..], x.dims()].concat();
    if shape.last() != Some(&n_in) {
        bail!("linears: {:?} does not fit {:?}", pack.dims(), x.dims());
    }
    shape[x.rank()] = n_out;
    let (x, pack) = (View::of(x)?, View::of(pack)?);
    let (y, rows) = (Buffer::new(device, shape, x.dtype)?, x.len / n_in.max(1));
    let factors = (Mat::view(&x, n_in), Mat::view(&pack, n_in).every(n_out * n_in).t());
    let (to, size) =
        (Mat::buffer(&y, n_out).every(rows * n_out), Size { batch: n, m: rows, n: n_out, k: n_in });
    product(device, to, Into::Replace, size, factors)?;
    let y = y.tensor();
    (0..n).map(|i| y.get(i)).collect()
}

pub(in crate::ops) fn linear_backward(
    x: &Tensor,
    dy: &Tensor,
    weight: &Param,
    bias: Option<&Param>,
) -> Result<Option<Tensor>> {
    let device = x.device().as_cuda_device()?;
    let dims = weight.dims();
    let (n_out, n_in) = (dims[0], dims[1]);
    let (input, dy) = (View::of(x)?, View::of(dy)?);
    let n = input.len / n_in.max(1);
    if let Some(bias) = bias.filter(|bias| bias.is_trainable()) {
        bias.add_grad(column_sums(device, &dy, n_out)?)?;
    }
    if weight.is_trainable() {
        let dw = Buffer::new(device, dims, DType::F32)?;
        let factors = (Mat::view(&dy, n_out).t(), Mat::view(&input, n_in));
        product(device, Mat::buffer(&dw, n_in), Into::Replace, Size::one(n_out, n_in, n), factors)?;
        weight.add_grad(dw.tensor())?;
    }
    if !x.track_op() {
        return Ok(None);
    }
    let weight = weight.weight(x.dtype())?;
    let weight = View::of(&weight)?;
    let dx = Buffer::new(device, x.dims(), x.dtype())?;
    let factors = (Mat::view(&dy, n_out), Mat::view(&weight, n_in));
    product(device, Mat::buffer(&dx, n_in), Into::Replace, Size::one(n, n_in, n_out), factors)?;
    Ok(Some(dx.tensor()))
}
