//! Differentiable operations, one file each: forward and gradient, on CPU and CUDA.
//!
//! candle cuts gradients silently in its fused operations, has wrong ones for pooling and upsampling, and naive ones
//! for convolution. So what a trained model is made of stands here: plain functions from tensors to tensors. A function
//! computes its value with a kernel and puts it into candle's graph as a custom operation (`custom_op.rs`). A
//! weight comes as a [`Param`](super::param::Param); its gradient goes into the weight, not into candle's store.
//!
//! Every function takes inputs with any strides and gives a contiguous result of the input's dtype. CPU: f32. CUDA:
//! f32 and bf16, with sums in f32.

mod activation;
mod adamw;
mod attention;
mod blockwise;
mod checkpoint;
mod concat;
mod conv2d;
mod cpu;
#[cfg(feature = "cuda")]
pub(super) mod cuda;
mod custom_op;
mod depthwise;
mod embedding;
mod geglu;
mod group_norm;
mod layer_norm;
mod linear;
mod projection;
mod recorded;
mod softmax;
mod tape;
mod upsample;

pub use activation::{Activation, activate};
pub use adamw::{AdamW, AdamWConfig, MomentFormat};
pub use attention::attention;
pub use checkpoint::checkpoint;
pub use concat::concat;
pub use conv2d::{Conv2dSpec, conv2d, conv2d_plus};
pub use depthwise::depthwise_conv2d;
pub use embedding::embedding;
pub use geglu::geglu;
pub use group_norm::{group_norm, group_norm_shifted};
pub use layer_norm::layer_norm;
pub use linear::{linear, linear_columns, linear_plus, linears};
pub(crate) use projection::to_tokens;
pub use projection::{picture_to_tokens, tokens_to_picture};
pub(crate) use recorded::recorded;
pub use softmax::softmax;
pub(crate) use upsample::upsample_bilinear;
pub use upsample::upsample_nearest;

/// The operations in a dry run, by the same names: see [`crate::dry_run`].
pub(crate) mod dry {
    pub(crate) use super::activation::dry as activate;
    pub(crate) use super::attention::dry as attention;
    pub(crate) use super::concat::dry as concat;
    pub(crate) use super::conv2d::dry as conv2d;
    pub(crate) use super::conv2d::dry_plus as conv2d_plus;
    pub(crate) use super::depthwise::dry as depthwise_conv2d;
    pub(crate) use super::embedding::dry as embedding;
    pub(crate) use super::geglu::dry as geglu;
    pub(crate) use super::group_norm::dry as group_norm;
    pub(crate) use super::group_norm::dry_shifted as group_norm_shifted;
    pub(crate) use super::layer_norm::dry as layer_norm;
    pub(crate) use super::linear::dry as linear;
    pub(crate) use super::linear::dry_plus as linear_plus;
    pub(crate) use super::projection::dry_to_picture as tokens_to_picture;
    pub(crate) use super::projection::dry_to_tokens as picture_to_tokens;
    pub(crate) use super::upsample::dry_nearest as upsample_nearest;
}
