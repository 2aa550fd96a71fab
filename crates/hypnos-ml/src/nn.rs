//! Neural network layers: named weights with the operations of [`ops`]. Fields carry the names of the checkpoint.

use std::sync::{Arc, OnceLock};

use candle_core::{Result, Tensor};

pub(crate) use super::ops::to_tokens;
use super::ops::{self, Activation, Conv2dSpec};
use super::param::Param;
use super::weights::Weights;

mod dry;
pub(crate) use dry::to_tokens_dry;

/// `y = x W^T + b` over the last dimension.
#[derive(Clone, Debug)]
pub(crate) struct Linear {
    weight: Param,
    bias: Option<Param>,
}

impl Linear {
    /// A layer `[.., n_in]` to `[.., n_out]` with a bias.
    pub(crate) fn load(w: &Weights, n_in: usize, n_out: usize) -> super::Result<Self> {
        Ok(Self { weight: w.get("weight", &[n_out, n_in])?, bias: Some(w.get("bias", &[n_out])?) })
    }

    /// A layer without a bias.
    pub(crate) fn load_no_bias(w: &Weights, n_in: usize, n_out: usize) -> super::Result<Self> {
        Ok(Self { weight: w.get("weight", &[n_out, n_in])?, bias: None })
    }

    /// `[.., n_in]` to `[.., n_out]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::linear(x, &self.weight, self.bias.as_ref())
    }

    /// The name of its weight.
    pub(crate) fn name(&self) -> &str {
        self.weight.name()
    }

    /// [`Linear::forward`] of one input by each of several layers without biases.
    pub(crate) fn forward_all(layers: &[&Self], x: &Tensor) -> Result<Vec<Tensor>> {
        let weights: Vec<&Param> = layers.iter().map(|layer| &layer.weight).collect();
        ops::linears(x, &weights)
    }

    /// [`Linear::forward`] of one input `[B, n_in]` by each of several layers with biases.
    pub(crate) fn forward_columns(layers: &[&Self], x: &Tensor) -> Result<Vec<Tensor>> {
        let layers: Option<Vec<(&Param, &Param)>> =
            layers.iter().map(|layer| Some((&layer.weight, layer.bias.as_ref()?))).collect();
        let Some(layers) = layers else {
            candle_core::bail!("a layer without a bias among those of columns")
        };
        ops::linear_columns(x, &layers)
    }

    /// Whether its weight or its bias learns.
    pub(crate) fn is_trainable(&self) -> bool {
        self.weight.is_trainable() || self.bias.as_ref().is_some_and(Param::is_trainable)
    }

    /// `residual` `[B, n_out, h, w]` and the layer of tokens `[B, h w, n_in]` as a picture, added up.
    pub(crate) fn forward_to_picture(&self, residual: &Tensor, x: &Tensor) -> Result<Tensor> {
        ops::tokens_to_picture(residual, x, &self.weight, self.bias.as_ref())
    }

    /// `residual`, `[.., n_out]`, and [`Linear::forward`] of `x`, added up.
    pub(crate) fn forward_plus(&self, residual: &Tensor, x: &Tensor) -> Result<Tensor> {
        ops::linear_plus(residual, x, &self.weight, self.bias.as_ref())
    }
}

/// Convolution.
#[derive(Clone, Debug)]
pub(crate) struct Conv2d {
    weight: Param,
    bias: Option<Param>,
    spec: Conv2dSpec,
}

impl Conv2d {
    /// A square kernel and a bias.
    pub(crate) fn load(
        w: &Weights,
        n_in: usize,
        n_out: usize,
        kernel: usize,
        spec: Conv2dSpec,
    ) -> super::Result<Self> {
        let weight = w.get("weight", &[n_out, n_in, kernel, kernel])?;
        Ok(Self { weight, bias: Some(w.get("bias", &[n_out])?), spec })
    }

    /// A square kernel without a bias.
    pub(crate) fn load_no_bias(
        w: &Weights,
        n_in: usize,
        n_out: usize,
        kernel: usize,
        spec: Conv2dSpec,
    ) -> super::Result<Self> {
        Ok(Self { weight: w.get("weight", &[n_out, n_in, kernel, kernel])?, bias: None, spec })
    }

    /// `[B, n_in, H, W]` to `[B, n_out, H', W']`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::conv2d(x, &self.weight, self.bias.as_ref(), self.spec)
    }

    /// `residual`, `[B, n_out, H', W']`, and [`Conv2d::forward`] of `x`, added up.
    fn forward_plus(&self, residual: &Tensor, x: &Tensor) -> Result<Tensor> {
        ops::conv2d_plus(residual, x, &self.weight, self.bias.as_ref(), self.spec)
    }
}

/// Layer norm over the last dimension.
#[derive(Clone, Debug)]
pub(crate) struct LayerNorm {
    weight: Param,
    bias: Param,
    eps: f64,
}

impl LayerNorm {
    /// Over `width` elements.
    pub(crate) fn load(w: &Weights, width: usize, eps: f64) -> super::Result<Self> {
        Ok(Self { weight: w.get("weight", &[width])?, bias: w.get("bias", &[width])?, eps })
    }

    /// `[.., width]` to the same.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::layer_norm(x, &self.weight, &self.bias, self.eps)
    }
}

/// Group norm with the activation that follows it.
#[derive(Clone, Debug)]
pub(crate) struct GroupNorm {
    weight: Param,
    bias: Param,
    n_groups: usize,
    eps: f64,
    activation: Option<Activation>,
}

impl GroupNorm {
    /// Over `n_channels` in `n_groups`.
    pub(crate) fn load(
        w: &Weights,
        n_channels: usize,
        n_groups: usize,
        eps: f64,
        activation: Option<Activation>,
    ) -> super::Result<Self> {
        let (weight, bias) = (w.get("weight", &[n_channels])?, w.get("bias", &[n_channels])?);
        Ok(Self { weight, bias, n_groups, eps, activation })
    }

    /// `[B, C, ..]` to the same.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_shifted(x, None)
    }

    /// With `shift` `[B, C]` added to `x` `[B, C, h, w]` first.
    fn forward_shifted(&self, x: &Tensor, shift: Option<&Tensor>) -> Result<Tensor> {
        let fused = self.activation == Some(Activation::Silu);
        let (weight, bias, n_groups) = (&self.weight, &self.bias, self.n_groups);
        let y = match shift {
            Some(shift) => ops::group_norm_shifted(x, shift, (weight, bias), n_groups, self.eps, fused)?,
            None => ops::group_norm(x, weight, bias, n_groups, self.eps, fused)?,
        };
        match self.activation {
            Some(activation) if !fused => ops::activate(&y, activation),
            _ => Ok(y),
        }
    }
}

/// A batch norm with fixed statistics: `scale x + shift` for each channel.
#[derive(Clone, Debug)]
pub(crate) struct BatchNorm {
    scale: Tensor,
    shift: Tensor,
}

impl BatchNorm {
    /// From its weight, bias and running statistics, `[n]` each.
    pub(crate) fn load(w: &Weights, n: usize, eps: f64) -> super::Result<Self> {
        let part = |name: &str| Ok::<_, super::Error>(w.get(name, &[n])?.value());
        let scale = (part("weight")? / (part("running_var")? + eps)?.sqrt()?)?;
        let shift = (part("bias")? - (part("running_mean")? * &scale)?)?;
        Ok(Self { scale, shift })
    }

    /// `[B, n, H, W]` to the same.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let per_channel = |values: &Tensor| values.reshape((1, values.elem_count(), 1, 1));
        x.broadcast_mul(&per_channel(&self.scale)?)?.broadcast_add(&per_channel(&self.shift)?)
    }
}

/// A frozen convolution without a bias, with the batch norm behind it folded in.
#[derive(Clone, Debug)]
pub(crate) struct NormedConv2d {
    weight: Param,
    bias: Param,
    spec: Conv2dSpec,
    depthwise: bool,
}

impl NormedConv2d {
    /// Of one group, `[O, C, kh, kw]`; convolution and norm by their names below `w`.
    pub(crate) fn load(
        w: &Weights,
        (conv, norm): (&str, &str),
        shape: [usize; 4],
        spec: Conv2dSpec,
        eps: f64,
    ) -> super::Result<Self> {
        let kernel = w.pp(conv).get("weight", &shape)?;
        Self::of(&kernel, &kernel.value(), &BatchNorm::load(&w.pp(norm), shape[0], eps)?, spec, false)
    }

    /// With a square kernel for each of `n` channels.
    pub(crate) fn load_depthwise(
        w: &Weights,
        (conv, norm): (&str, &str),
        (n, kernel): (usize, usize),
        spec: Conv2dSpec,
        eps: f64,
    ) -> super::Result<Self> {
        let kernel = w.pp(conv).get("weight", &[n, 1, kernel, kernel])?;
        Self::of(&kernel, &kernel.value(), &BatchNorm::load(&w.pp(norm), n, eps)?, spec, true)
    }

    /// With these values in the place of the kernel `named`.
    pub(crate) fn of(
        named: &Param,
        kernel: &Tensor,
        norm: &BatchNorm,
        spec: Conv2dSpec,
        depthwise: bool,
    ) -> super::Result<Self> {
        let weight = kernel.broadcast_mul(&norm.scale.reshape((kernel.dim(0)?, 1, 1, 1))?)?;
        let bias = format!("{} and its norm", named.name());
        Ok(Self {
            weight: Param::new(named.name(), weight, false)?,
            bias: Param::new(bias, norm.shift.clone(), false)?,
            spec,
            depthwise,
        })
    }

    /// `[B, C, H, W]` to `[B, O, H', W']`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let conv = if self.depthwise { ops::depthwise_conv2d } else { ops::conv2d };
        conv(x, &self.weight, Some(&self.bias), self.spec)
    }
}

/// What the residual blocks of one model have in common.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ResnetConfig {
    /// Groups of each norm.
    pub(crate) n_groups: usize,
    /// Eps of each norm.
    pub(crate) eps: f64,
    /// Activation after each norm.
    pub(crate) activation: Activation,
    /// Width of the time embedding, where there is one.
    pub(crate) time_width: Option<usize>,
}

/// Residual block: two convolutions, the time embedding added between them. Ports diffusers' `ResnetBlock2D`.
#[derive(Clone, Debug)]
pub(crate) struct Resnet {
    norm1: GroupNorm,
    conv1: Conv2d,
    time_emb_proj: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv2d,
    conv_shortcut: Option<Conv2d>,
    /// The biases of `conv2` and the shortcut, added up where neither learns. Clones share it.
    joint_bias: Arc<OnceLock<Param>>,
    activation: Activation,
}

/// What a residual block adds between its convolutions.
#[derive(Clone, Copy)]
pub(crate) enum Time<'a> {
    /// The time embedding `[B, time width]`, which the block projects; activated on a GPU, see
    /// [`ResnetConfig::shared_time`].
    Embedding(&'a Tensor),
    /// What [`Resnet::time_projection`] makes of it, `[B, n_out]`; on a GPU only.
    Projected(&'a Tensor),
}

impl Resnet {
    /// From `n_in` to `n_out` channels; a 1x1 shortcut where they differ.
    pub(crate) fn load(w: &Weights, n_in: usize, n_out: usize, config: &ResnetConfig) -> super::Result<Self> {
        let ResnetConfig { n_groups, eps, activation, time_width } = *config;
        let norm = |name: &str, n| GroupNorm::load(&w.pp(name), n, n_groups, eps, Some(activation));
        let conv = |name: &str, n| Conv2d::load(&w.pp(name), n, n_out, 3, Conv2dSpec::padded(1, 1));
        let shortcut = || Conv2d::load(&w.pp("conv_shortcut"), n_in, n_out, 1, Conv2dSpec::padded(1, 0));
        Ok(Self {
            norm1: norm("norm1", n_in)?,
            conv1: conv("conv1", n_in)?,
            time_emb_proj: time_width
                .map(|width| Linear::load(&w.pp("time_emb_proj"), width, n_out))
                .transpose()?,
            norm2: norm("norm2", n_out)?,
            conv2: conv("conv2", n_out)?,
            conv_shortcut: (n_in != n_out).then(shortcut).transpose()?,
            joint_bias: Arc::default(),
            activation,
        })
    }

    /// * `x` `[B, n_in, h, w]`
    /// * `time`, wanted exactly if the block was configured with a time embedding
    ///
    /// Gives `[B, n_out, h, w]`.
    pub(crate) fn forward(&self, x: &Tensor, time: Option<Time>) -> Result<Tensor> {
        let mut hidden = self.conv1.forward(&self.norm1.forward(x)?)?;
        let mut shift = None;
        match (&self.time_emb_proj, time) {
            (Some(project), Some(Time::Embedding(time))) if x.device().is_cuda() => {
                shift = Some(project.forward(time)?);
            }
            (Some(project), Some(Time::Embedding(time))) => {
                let time = project.forward(&ops::activate(time, self.activation)?)?;
                hidden = hidden.broadcast_add(&time.unsqueeze(2)?.unsqueeze(3)?)?; // [B, n_out, 1, 1]
            }
            (_, Some(Time::Projected(time))) => shift = Some(time.clone()),
            _ => {}
        }
        let normed = self.norm2.forward_shifted(&hidden, shift.as_ref())?;
        if x.device().is_cuda() {
            return match &self.conv_shortcut {
                Some(shortcut) => self.forward_both(&normed, shortcut, x),
                None => self.conv2.forward_plus(x, &normed),
            };
        }
        let hidden = self.conv2.forward(&normed)?;
        drop(normed);
        match &self.conv_shortcut {
            Some(shortcut) => shortcut.forward(x)? + hidden,
            None => x + hidden,
        }
    }

    /// The layer of the time embedding, where there is one.
    pub(crate) fn time_projection(&self) -> Option<&Linear> {
        self.time_emb_proj.as_ref()
    }

    /// `conv2` of `normed` and the shortcut of `x`, added up.
    fn forward_both(&self, normed: &Tensor, shortcut: &Conv2d, x: &Tensor) -> Result<Tensor> {
        let (Some(bias), Some(other)) = (&self.conv2.bias, &shortcut.bias) else {
            return self.conv2.forward_plus(&shortcut.forward(x)?, normed);
        };
        if bias.is_trainable() || other.is_trainable() {
            return self.conv2.forward_plus(&shortcut.forward(x)?, normed);
        }
        let joint = if let Some(joint) = self.joint_bias.get() {
            joint
        } else {
            let sum = Param::new(bias.name(), (bias.value() + other.value())?, false)?;
            self.joint_bias.get_or_init(|| sum)
        };
        let residual = ops::conv2d(x, &shortcut.weight, None, shortcut.spec)?;
        ops::conv2d_plus(&residual, normed, &self.conv2.weight, Some(joint), self.conv2.spec)
    }
}

impl ResnetConfig {
    /// The time embedding as the blocks of one model take it: on a GPU activated once for all of them. On the CPU each
    /// activates it itself, whose gradients another order of sums would change in their last bits.
    pub(crate) fn shared_time(&self, time: Tensor) -> Result<Tensor> {
        if time.device().is_cuda() { ops::activate(&time, self.activation) } else { Ok(time) }
    }
}

/// `1 / (1 + e^-x)`, by way of tanh, which is finite at both ends. Differentiable.
pub(crate) fn sigmoid(x: &Tensor) -> Result<Tensor> {
    ((x * 0.5)?.tanh()? * 0.5)? + 0.5
}

/// The largest value in windows of `kernel` by `kernel`: torch's `MaxPool2d`. Differentiable.
///
/// `[B, C, H, W]` to `[B, C, H', W']`. What lies beyond the edge does not count; `padding` is at most half of the
/// kernel, so that every window sees a pixel.
pub fn max_pool2d(x: &Tensor, kernel: usize, stride: usize, padding: usize) -> Result<Tensor> {
    let mut x = x.clone();
    for dim in [2, 3] {
        let windows = Windows::new(x.dim(dim)?, kernel, stride, padding)?;
        // A pixel beyond the edge is read as the one at the edge, which the window holds anyway.
        let mut pooled = windows.tap(&x, dim, 0)?;
        for tap in 1..kernel {
            pooled = pooled.maximum(&windows.tap(&x, dim, tap)?)?;
        }
        x = pooled;
    }
    Ok(x)
}

/// The mean of windows of `kernel` by `kernel` over the pixels that are there: torch's `AvgPool2d` with
/// `count_include_pad=False`. Differentiable.
///
/// `[B, C, H, W]` to `[B, C, H', W']`, `padding` as in [`max_pool2d`].
pub fn avg_pool2d(x: &Tensor, kernel: usize, stride: usize, padding: usize) -> Result<Tensor> {
    let mut x = x.clone();
    for dim in [2, 3] {
        let windows = Windows::new(x.dim(dim)?, kernel, stride, padding)?;
        let shape = if dim == 2 { (1, 1, windows.n, 1) } else { (1, 1, 1, windows.n) };
        let mut pooled: Option<Tensor> = None;
        for tap in 0..kernel {
            let shares = Tensor::new(windows.shares(tap), x.device())?.to_dtype(x.dtype())?.reshape(shape)?;
            let term = windows.tap(&x, dim, tap)?.broadcast_mul(&shares)?;
            pooled = Some(match pooled {
                Some(before) => (before + term)?,
                None => term,
            });
        }
        x = pooled.unwrap_or(x);
    }
    Ok(x)
}

/// The windows of a pool along one axis.
struct Windows {
    size: usize,
    kernel: usize,
    stride: usize,
    padding: usize,
    n: usize,
}

impl Windows {
    fn new(size: usize, kernel: usize, stride: usize, padding: usize) -> Result<Self> {
        match (size + 2 * padding).checked_sub(kernel) {
            Some(room) if kernel > 0 && stride > 0 && 2 * padding <= kernel => {
                Ok(Self { size, kernel, stride, padding, n: room / stride + 1 })
            }
            _ => candle_core::bail!("pool: windows of {kernel} with padding {padding} over {size} pixels"),
        }
    }

    /// Whether tap `tap` of window `i` lies on a pixel.
    fn holds(&self, i: usize, tap: usize) -> bool {
        (self.padding..self.padding + self.size).contains(&(i * self.stride + tap))
    }

    /// Pixel `tap` of every window.
    fn tap(&self, x: &Tensor, dim: usize, tap: usize) -> Result<Tensor> {
        let place = |i: usize| (i * self.stride + tap).saturating_sub(self.padding).min(self.size - 1) as u32;
        x.index_select(&Tensor::from_iter((0..self.n).map(place), x.device())?, dim)
    }

    /// What pixel `tap` counts for in the mean of each window.
    fn shares(&self, tap: usize) -> Vec<f32> {
        let share = |i: usize| {
            let n_held = (0..self.kernel).filter(|&tap| self.holds(i, tap)).count();
            if self.holds(i, tap) { 1.0 / n_held as f32 } else { 0.0 }
        };
        (0..self.n).map(share).collect()
    }
}
