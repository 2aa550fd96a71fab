//! Pictures side by side in their channels.

use candle_core::{Result, Tensor};

#[cfg(feature = "cuda")]
use super::custom_op::custom_op;
use crate::dry_run::{Cost, DryTensor};

/// The channels of `a` and then those of `b`: `[B, C, h, w]` and `[B, D, h, w]` to `[B, C + D, h, w]`. Differentiable.
///
/// A GPU copies both in one launch, and their gradients in one launch.
pub fn concat(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if a.device().is_cuda() {
        return on_gpu(&a.contiguous()?, &b.contiguous()?);
    }
    Tensor::cat(&[a, b], 1)
}

#[cfg(feature = "cuda")]
fn on_gpu(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let ((n, c, h, w), (n_b, d, h_b, w_b)) = (a.dims4()?, b.dims4()?);
    if (n, h, w) != (n_b, h_b, w_b) || a.dtype() != b.dtype() {
        candle_core::bail!("concat: {:?} and {:?} do not go side by side", a.dims(), b.dims());
    }
    let value = super::cuda::concat(a, b, (n, c + d, h, w))?;
    let (of_a, of_b) = (a.clone(), b.clone());
    custom_op("concat", &[a, b], value, move |dy| {
        let [da, db] = super::cuda::concat_backward(dy, &of_a, &of_b)?;
        Ok([da, db, None])
    })
}

/// [`concat()`] in a dry run.
pub(crate) fn dry(a: &DryTensor, b: &DryTensor) -> DryTensor {
    if !a.meter().on_gpu() {
        return DryTensor::cat(&[a, b], 1);
    }
    let (a, b) = (a.contiguous(), b.contiguous());
    let mut dims = a.dims().to_vec();
    dims[1] += b.dims()[1];
    a.custom(&[&a, &b], &dims, Cost::default())
}
