//! Floating point operations, and the seconds that they take where a device's speed was measured.

use candle_core::{DType, Device, Tensor};
use serde::Serialize;

use crate::Result;
use crate::bundle::Bundle;
use crate::dry_run::Meter;
use crate::ops::{self, Conv2dSpec};
use crate::param::Param;
use crate::precision::Precision;

/// Floating point operations, 2 for each multiplication with its addition.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Arithmetic {
    /// Of matrix products and attention.
    pub products: f64,
    /// Of convolutions.
    pub convolutions: f64,
}

impl Arithmetic {
    pub(super) fn of(meter: &Meter) -> Self {
        let [products, convolutions] = meter.flops();
        Self { products, convolutions }
    }

    /// All of them.
    pub fn total(&self) -> f64 {
        self.products + self.convolutions
    }

    /// `n` times as many.
    #[must_use]
    pub fn times(&self, n: f64) -> Self {
        Self { products: n * self.products, convolutions: n * self.convolutions }
    }

    /// Both.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        Self {
            products: self.products + other.products,
            convolutions: self.convolutions + other.convolutions,
        }
    }

    /// Seconds at these rates. An estimate: what is no arithmetic is not counted.
    pub fn seconds(&self, rates: &Rates) -> f64 {
        self.products / rates.products + self.convolutions / rates.convolutions
    }
}

/// Operations in a second.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Rates {
    /// Of matrix products.
    pub products: f64,
    /// Of convolutions.
    pub convolutions: f64,
}

/// A matrix product and a convolution of a UNet's own shapes, to measure a device with.
#[derive(Debug)]
pub struct Calibration {
    matrix: (Tensor, Param),
    kernel: (Tensor, Param),
}

impl Calibration {
    /// Of the second level of the bundle's UNet, or of its only one, for two pictures of its own size: neither its
    /// largest pictures nor its largest weights. In `precision`, which the device must have.
    pub fn new(bundle: &Bundle, device: &Device, precision: Precision) -> Result<Self> {
        let channels = &bundle.configs().1.block_out_channels;
        let level = usize::from(channels.len() > 1);
        let (n, side) =
            (channels[level], (bundle.resolution() / bundle.factor()).div_ceil(1 << level).max(1));
        let tensor =
            |shape: &[usize]| Tensor::full(0.01f32, shape, device)?.contiguous()?.to_dtype(precision.dtype());
        let weight = |shape: &[usize]| Param::new("calibration", tensor(shape)?, false);
        Ok(Self {
            matrix: (tensor(&[2, side * side, n])?, weight(&[8 * n, n])?),
            kernel: (tensor(&[2, n, side, side])?, weight(&[n, n, 3, 3])?),
        })
    }

    /// Computes the product once and waits for it. Gives the operations that it took.
    pub fn product(&self) -> Result<f64> {
        let (x, weight) = &self.matrix;
        wait(&ops::linear(x, weight, None)?)?;
        Ok(2.0 * (x.elem_count() * weight.dims()[0]) as f64)
    }

    /// Computes the convolution once and waits for it. Gives the operations that it took.
    pub fn convolution(&self) -> Result<f64> {
        let (x, weight) = &self.kernel;
        wait(&ops::conv2d(x, weight, None, Conv2dSpec::padded(1, 1))?)?;
        Ok(2.0 * (x.elem_count() * weight.dims()[0] * 9) as f64)
    }
}

/// A GPU has computed a value when a part of it arrives.
fn wait(y: &Tensor) -> Result<()> {
    y.flatten_all()?.narrow(0, 0, 1)?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
    Ok(())
}
