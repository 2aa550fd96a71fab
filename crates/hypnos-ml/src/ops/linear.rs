//! `y = x W^T + b`.

#[cfg(feature = "cuda")]
use std::collections::BTreeMap;

#[cfg(feature = "cuda")]
use candle_core::DType;
use candle_core::{Device, Result, Tensor, bail};

use super::cpu::{Into, Mat, Threads, View, gemm, product, zeros};
use super::custom_op::{Computed, custom_op, trained_tag};
use crate::dry_run::{Cost, DryTensor, gradient_bytes};
use crate::param::Param;

/// A dense layer over the last dimension.
///
/// * `x` `[.., I]`
/// * `weight` `[O, I]`, or `[O, I, 1, 1]` as old checkpoints have it; `bias` `[O]`
///
/// Gives `[.., O]`. Differentiable in `x`, `weight` and `bias`.
pub fn linear(x: &Tensor, weight: &Param, bias: Option<&Param>) -> Result<Tensor> {
    layer(x, weight, bias, None)
}

/// [`linear()`] of one input `[.., I]` by each of several weights `[O, I]` without biases, in their order: `[.., O]`
/// each.
///
/// Differentiable as [`linear()`] is. Where nothing is differentiated, a GPU multiplies in bf16 by all weights of one
/// shape at once.
pub fn linears(x: &Tensor, weights: &[&Param]) -> Result<Vec<Tensor>> {
    #[cfg(feature = "cuda")]
    if is_constant(x, weights) {
        let mut shapes: BTreeMap<Vec<usize>, Vec<usize>> = BTreeMap::new();
        for (i, weight) in weights.iter().enumerate() {
            shapes.entry(weight.dims()).or_default().push(i);
        }
        let (x, mut results) = (x.contiguous()?, vec![None; weights.len()]);
        for (shape, places) in shapes {
            let group: Vec<&Param> = places.iter().map(|&i| weights[i]).collect();
            let pack = Param::pack(&group, x.dtype())?.reshape((group.len(), shape[0], shape[1]))?;
            for (i, y) in places.into_iter().zip(super::cuda::linears(&x, &pack)?) {
                results[i] = Some(y);
            }
        }
        return Ok(results.into_iter().flatten().collect());
    }
    weights.iter().map(|weight| linear(x, weight, None)).collect()
}

/// [`linear()`] of one input `[B, I]` by each of several weights and biases, in their order: `[B, O]` each.
///
/// Differentiable as [`linear()`] is. Where nothing is differentiated, a GPU multiplies by all of them at once, and the
/// results are columns of one tensor.
pub fn linear_columns(x: &Tensor, layers: &[(&Param, &Param)]) -> Result<Vec<Tensor>> {
    #[cfg(feature = "cuda")]
    {
        let (weights, biases): (Vec<&Param>, Vec<&Param>) = layers.iter().copied().unzip();
        if is_constant(x, &weights) && is_constant(x, &biases) {
            let (weight, bias) = (Param::pack(&weights, x.dtype())?, Param::pack(&biases, x.dtype())?);
            let (y, mut at) = (super::cuda::linear_of(&x.contiguous()?, &weight, &bias)?, 0);
            let columns = weights.iter().map(|weight| {
                let (begin, size) = (at, weight.dims()[0]);
                at += size;
                y.narrow(1, begin, size)
            });
            return columns.collect();
        }
    }
    layers.iter().map(|(weight, bias)| linear(x, weight, Some(bias))).collect()
}

/// Whether `x` is bf16 on a GPU and neither it nor a weight gets a gradient. f32 weights are not joined: frozen ones may
/// share their values with weights that learn, which would stay beside the joined copy.
#[cfg(feature = "cuda")]
fn is_constant(x: &Tensor, params: &[&Param]) -> bool {
    let is_frozen = !x.track_op() && !params.iter().any(|param| param.is_trainable());
    is_frozen && x.device().is_cuda() && x.dtype() == DType::BF16
}

/// `residual + linear(x, weight, bias)`, see [`linear()`]. `residual` `[.., O]` must have the dtype of `x`.
///
/// Differentiable in `residual`, `x`, `weight` and `bias`. A GPU adds `residual` in the call of cuBLASLt, or to the stored
/// result where that has no algorithm. Errors if `residual` has another shape.
pub fn linear_plus(residual: &Tensor, x: &Tensor, weight: &Param, bias: Option<&Param>) -> Result<Tensor> {
    if !x.device().is_cuda() {
        return residual + linear(x, weight, bias)?;
    }
    layer(x, weight, bias, Some(residual))
}

/// `more` on a GPU only.
fn layer(x: &Tensor, weight: &Param, bias: Option<&Param>, more: Option<&Tensor>) -> Result<Tensor> {
    let dims = weight.dims();
    let (n_out, n_in) = (dims[0], dims[1]);
    let Some((&last, lead)) = x.dims().split_last() else { bail!("linear: got a scalar") };
    if last != n_in {
        bail!("{}: wanted inputs of width {n_in}, got {:?}", weight.name(), x.dims());
    }
    let shape = [lead, &[n_out]].concat();
    if let Some(more) = more.filter(|more| more.dims() != shape) {
        bail!("{}: wanted {shape:?} to add, got {:?}", weight.name(), more.dims());
    }
    let (x, more) = (x.contiguous()?, more.map(Tensor::contiguous).transpose()?);
    let value = match x.device() {
        Device::Cpu => Computed::cpu(forward(&x, weight, bias, n_out, n_in)?, shape),
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => super::cuda::linear(&x, weight, bias, more.as_ref(), shape)?,
        other => bail!("linear: no kernel for {other:?}"),
    };
    let (weight, bias, input) = (weight.clone(), bias.cloned(), x.clone());
    let tag = trained_tag(&weight, bias.as_ref());
    let adds = more.as_ref().is_some_and(Tensor::track_op);
    let inputs: Vec<&Tensor> = [&x, &tag].into_iter().chain(&more).collect();
    custom_op("linear", &inputs, value, move |dy| {
        let dx = match dy.device() {
            Device::Cpu => backward(&input, dy, &weight, bias.as_ref(), n_out, n_in)?,
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => super::cuda::linear_backward(&input, dy, &weight, bias.as_ref())?,
            other => bail!("linear: no kernel for {other:?}"),
        };
        Ok([dx, None, adds.then(|| dy.clone())])
    })
}

fn forward(x: &Tensor, weight: &Param, bias: Option<&Param>, n_out: usize, n_in: usize) -> Result<Vec<f32>> {
    let (x, weight) = (View::of(x, "linear")?, weight.value());
    let weight = View::of(&weight, "linear")?;
    let n = x.len() / n_in;
    let factors = (Mat::rows(&x, n_in), Mat::rows(&weight, n_in).t());
    let Some(bias) = bias else { return Ok(product((n, n_out, n_in), factors, 1.0)) };
    let bias = bias.value();
    let mut y = View::of(&bias, "linear")?.repeat(n);
    gemm(&mut y, n_out, Into::Add, (n, n_out, n_in), factors, 1.0, Threads::All);
    Ok(y)
}

fn backward(
    x: &Tensor,
    dy: &Tensor,
    weight: &Param,
    bias: Option<&Param>,
    n_out: usize,
    n_in: usize,
) -> Result<Option<Tensor>> {
    let (input, dy_view) = (View::of(x, "linear")?, View::of(dy, "linear")?);
    let n = input.len() / n_in;
    let dy = Mat::rows(&dy_view, n_out);
    if weight.is_trainable() {
        let dw = product((n_out, n_in, n), (dy.t(), Mat::rows(&input, n_in)), 1.0);
        weight.add_grad(Computed::cpu(dw, weight.dims()).detached())?;
    }
    if let Some(bias) = bias.filter(|bias| bias.is_trainable()) {
        bias.add_grad(Computed::cpu(column_sums(&dy_view, n_out), n_out).detached())?;
    }
    if !x.track_op() {
        return Ok(None);
    }
    let value = weight.value();
    let weight = View::of(&value, "linear")?;
    let dx = product((n, n_in, n_out), (dy, Mat::rows(&weight, n_in)), 1.0);
    Ok(Some(Computed::cpu(dx, x.dims()).detached()))
}

/// [`linear()`] in a dry run. Its input is kept.
pub(crate) fn dry(x: &DryTensor, weight: &Param, bias: Option<&Param>) -> DryTensor {
    layer_dry(x, weight, bias, None)
}

fn layer_dry(x: &DryTensor, weight: &Param, bias: Option<&Param>, more: Option<&DryTensor>) -> DryTensor {
    let (x, dims) = (x.contiguous(), weight.dims());
    let mut shape = x.dims().to_vec();
    let n_rows = x.len() / dims[1].max(1);
    if let Some(last) = shape.last_mut() {
        *last = dims[0];
    }
    let more = more.map(DryTensor::contiguous);
    let inputs: Vec<&DryTensor> = [&x].into_iter().chain(&more).collect();
    x.custom(&inputs, &shape, cost(n_rows, weight, bias))
}

/// What a layer of `n_rows` costs.
pub(super) fn cost(n_rows: usize, weight: &Param, bias: Option<&Param>) -> Cost {
    let (n_out, n_in) = (weight.dims()[0], weight.dims()[1]);
    let flops = 2.0 * n_rows as f64 * n_out as f64 * n_in as f64;
    let gradients = gradient_bytes([Some(weight), bias].into_iter().flatten());
    Cost { flops, input_flops: flops, weight_flops: flops, gradients, ..Cost::default() }
}

/// [`linear_plus()`] in a dry run.
pub(crate) fn dry_plus(
    residual: &DryTensor,
    x: &DryTensor,
    weight: &Param,
    bias: Option<&Param>,
) -> DryTensor {
    if x.meter().on_gpu() {
        layer_dry(x, weight, bias, Some(residual))
    } else {
        residual.plus(&dry(x, weight, bias))
    }
}

/// Sums over rows of width `n`, in f32 within blocks of rows and f64 across them.
pub(super) fn column_sums(rows: &[f32], n: usize) -> Vec<f32> {
    const BLOCK: usize = 64;
    let mut total = vec![0.0_f64; n];
    let mut part = zeros(n);
    for block in rows.chunks(BLOCK * n) {
        part.fill(0.0);
        for row in block.chunks_exact(n) {
            part.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
        }
        total.iter_mut().zip(&part).for_each(|(sum, &value)| *sum += f64::from(value));
    }
    total.into_iter().map(|sum| sum as f32).collect()
}
