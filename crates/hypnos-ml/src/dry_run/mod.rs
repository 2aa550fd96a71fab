//! Dry runs: the layers of a model on shapes alone, to count what a forward and a backward take without either.
//!
//! A [`DryTensor`] has dimensions and no values. Operations on it allocate, share, keep and free as those on tensors do,
//! and candle's graph is imitated node by node: a value lives as long as something holds it, a tracked operation holds its
//! inputs, the backward goes through the graph in candle's order. So the peak of a dry run is the peak of a real one, but
//! for what an allocator adds. What an operation of ours keeps, and what its backward works with, is said beside it in
//! [`crate::ops`], as its function `dry`; candle's own operations are in `candle_ops.rs`. A model's dry forward stands
//! beside the real one, in its file `dry.rs`, and reads the layers of a model that was loaded from shape-only weights.
//!
//! Values are f32, or bf16 from where a model rounds what enters it. Arithmetic is counted in matrix products, convolutions
//! and attention only, 2 for each multiplication with its addition: the rest is memory traffic.

mod backward;
mod candle_ops;
mod meter;
mod tensor;

pub(crate) use backward::backward;
pub(crate) use candle_ops::sigmoid;
pub(crate) use meter::Meter;
pub(crate) use tensor::{Cost, DryTensor, checkpoint};

use crate::param::Param;

/// Bytes of the gradients that a backward leaves in those of `params` that learn.
pub(crate) fn gradient_bytes<'a>(params: impl IntoIterator<Item = &'a Param>) -> u64 {
    params.into_iter().filter(|param| param.is_trainable()).map(bytes_of).sum()
}

/// Bytes of a weight as it is held, and of the gradient of one that learns.
pub(crate) fn bytes_of(param: &Param) -> u64 {
    let value = param.value();
    (value.dtype().size_in_bytes() * value.elem_count()) as u64
}
