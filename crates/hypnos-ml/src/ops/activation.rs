//! Elementwise activations.

use candle_core::{Device, Result, Tensor, bail};
use serde::Deserialize;

use crate::dry_run::{Cost, DryTensor};

use super::cpu::{View, erf, exp, par_chunks, sigmoid, zeros};
use super::custom_op::{Computed, custom_op};

/// An activation, by the name that diffusers' and transformers' configs use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x sigmoid(x)`
    #[serde(alias = "swish")]
    Silu,
    /// `x Phi(x)` with the error function, not its tanh approximation
    Gelu,
    /// `x sigmoid(1.702 x)`, OpenAI CLIP's
    QuickGelu,
}

impl Activation {
    #[inline]
    fn value(self, x: f32) -> f32 {
        match self {
            Self::Silu => x * sigmoid(x),
            Self::Gelu => x * normal_cdf(x),
            Self::QuickGelu => x * sigmoid(1.702 * x),
        }
    }

    #[inline]
    fn slope(self, x: f32) -> f32 {
        match self {
            Self::Silu => silu_slope(x),
            Self::Gelu => gelu_slope(x),
            Self::QuickGelu => {
                let s = sigmoid(1.702 * x);
                s * (1.0 + 1.702 * x * (1.0 - s))
            }
        }
    }
}

/// Standard normal distribution function.
#[inline]
pub(super) fn normal_cdf(x: f32) -> f32 {
    0.5 * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2))
}

/// Derivative of `x Phi(x)`.
#[inline]
pub(super) fn gelu_slope(x: f32) -> f32 {
    const INV_SQRT_2PI: f32 = 0.398_942_3;
    normal_cdf(x) + x * INV_SQRT_2PI * exp(-0.5 * x * x)
}

/// Derivative of `x sigmoid(x)`.
#[inline]
pub(super) fn silu_slope(x: f32) -> f32 {
    let s = sigmoid(x);
    s * (1.0 + x * (1.0 - s))
}

/// Applies `activation` to every element. Any shape; differentiable.
pub fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    let x = x.contiguous()?;
    let value = match x.device() {
        Device::Cpu => forward(&x, activation)?,
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => super::cuda::activation(&x, activation)?,
        other => bail!("activation: no kernel for {other:?}"),
    };
    let input = x.clone();
    custom_op("activation", &[&x], value, move |dy| {
        let dx = match dy.device() {
            Device::Cpu => backward(&input, dy, activation)?,
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => super::cuda::activation_backward(&input, dy, activation)?,
            other => bail!("activation: no kernel for {other:?}"),
        };
        Ok([Some(dx.detached()), None, None])
    })
}

/// [`activate()`] in a dry run. Its input is kept.
pub(crate) fn dry(x: &DryTensor) -> DryTensor {
    let x = x.contiguous();
    x.custom(&[&x], x.dims(), Cost::default())
}

fn forward(x: &Tensor, activation: Activation) -> Result<Computed> {
    let view = View::of(x, "activation")?;
    // One loop per activation, so that each is vectorised.
    let y = match activation {
        Activation::Silu => map(&view, |v| Activation::Silu.value(v)),
        Activation::Gelu => map(&view, |v| Activation::Gelu.value(v)),
        Activation::QuickGelu => map(&view, |v| Activation::QuickGelu.value(v)),
    };
    Ok(Computed::cpu(y, x.dims()))
}

fn backward(x: &Tensor, dy: &Tensor, activation: Activation) -> Result<Computed> {
    let (view, dy) = (View::of(x, "activation")?, View::of(dy, "activation")?);
    let dx = match activation {
        Activation::Silu => map2(&view, &dy, |v, d| d * Activation::Silu.slope(v)),
        Activation::Gelu => map2(&view, &dy, |v, d| d * Activation::Gelu.slope(v)),
        Activation::QuickGelu => map2(&view, &dy, |v, d| d * Activation::QuickGelu.slope(v)),
    };
    Ok(Computed::cpu(dx, x.dims()))
}

fn map(x: &[f32], f: impl Fn(f32) -> f32 + Sync) -> Vec<f32> {
    let mut y = zeros(x.len());
    par_chunks(&mut y, |range, part| {
        part.iter_mut().zip(&x[range]).for_each(|(y, &x)| *y = f(x));
    });
    y
}

fn map2(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32 + Sync) -> Vec<f32> {
    let mut y = zeros(a.len());
    par_chunks(&mut y, |range, part| {
        part.iter_mut().zip(&a[range.clone()]).zip(&b[range]).for_each(|((y, &a), &b)| *y = f(a, b));
    });
    y
}
