//! candle's own operations in a dry run: those that the models use. Each says by way of how many values of its input's
//! size its backward makes a gradient, as candle 0.11's `backprop.rs` writes it.

use candle_core::DType;

use super::tensor::DryTensor;

impl DryTensor {
    /// `self + other`, or the difference: the gradients are the result's.
    pub(crate) fn plus(&self, other: &Self) -> Self {
        self.elementwise(&[self, other], 0)
    }

    /// `self * other`.
    pub(crate) fn times(&self, other: &Self) -> Self {
        self.elementwise(&[self, other], 1)
    }

    /// `a x + b` for numbers a and b.
    pub(crate) fn affine(&self) -> Self {
        self.elementwise(&[self], 1)
    }

    /// `x^2`.
    pub(crate) fn sqr(&self) -> Self {
        self.elementwise(&[self], 2)
    }

    /// `tanh x`: the square of the result, less one, times the gradient.
    pub(crate) fn tanh(&self) -> Self {
        self.elementwise(&[self], 3)
    }

    /// The values in another dtype; itself where that is its own.
    pub(crate) fn to_dtype(&self, dtype: DType) -> Self {
        if self.dtype() == dtype {
            return self.clone();
        }
        Self::new(self.meter(), self.dims(), dtype, Self::candle_node(&[self], 1))
    }

    fn elementwise(&self, inputs: &[&Self], temporaries: u64) -> Self {
        Self::new(self.meter(), self.dims(), self.dtype(), Self::candle_node(inputs, temporaries))
    }

    /// The sum over dimension `dim`, which leaves, times a number: candle's mean.
    pub(crate) fn mean(&self, dim: usize) -> Self {
        let mut dims = self.dims().to_vec();
        dims.remove(dim);
        Self::new(self.meter(), &dims, self.dtype(), Self::candle_node(&[self], 0)).affine()
    }

    /// The mean of everything.
    pub(crate) fn mean_all(&self) -> Self {
        Self::new(self.meter(), &[], self.dtype(), Self::candle_node(&[self], 0)).affine()
    }

    /// As large as `dims`, by strides of zero.
    pub(crate) fn broadcast_as(&self, dims: &[usize]) -> Self {
        if self.dims() == dims {
            return self.clone();
        }
        self.view(dims, false, Self::candle_node(&[self], 0))
    }

    /// Other dimensions for as many elements. A copy where rows do not follow one another.
    pub(crate) fn reshape(&self, dims: &[usize]) -> Self {
        debug_assert_eq!(self.len(), dims.iter().product::<usize>());
        if self.is_contiguous() {
            return self.view(dims, true, Self::candle_node(&[self], 0));
        }
        Self::new(self.meter(), dims, self.dtype(), Self::candle_node(&[self], 0))
    }

    pub(crate) fn transpose(&self, a: usize, b: usize) -> Self {
        let mut dims = self.dims().to_vec();
        dims.swap(a, b);
        let is_contiguous = self.is_contiguous() && (dims[a] == 1 || dims[b] == 1) && a.abs_diff(b) == 1;
        self.view(&dims, is_contiguous, Self::candle_node(&[self], 0))
    }

    /// `n` of the rows of dimension `dim`. The gradient is padded with zeros: the padding and what comes of it.
    pub(crate) fn narrow(&self, dim: usize, n: usize) -> Self {
        let mut dims = self.dims().to_vec();
        if dims[dim] == n {
            return self.clone();
        }
        dims[dim] = n;
        let is_contiguous = self.is_contiguous() && dims[..dim].iter().all(|&n| n == 1);
        self.view(&dims, is_contiguous, Self::candle_node(&[self], 2))
    }

    /// Itself where rows follow one another, else a copy.
    pub(crate) fn contiguous(&self) -> Self {
        if self.is_contiguous() { self.clone() } else { self.elementwise(&[self], 0) }
    }

    /// Side by side along `dim`.
    pub(crate) fn cat(parts: &[&Self], dim: usize) -> Self {
        let mut dims = parts[0].dims().to_vec();
        dims[dim] = parts.iter().map(|part| part.dims()[dim]).sum();
        Self::new(parts[0].meter(), &dims, parts[0].dtype(), Self::candle_node(parts, 0))
    }

    /// `self * other`, where `other` is broadcast.
    pub(crate) fn broadcast_times(&self, other: &Self) -> Self {
        self.times(&other.broadcast_as(self.dims()))
    }

    /// `self + other`, where `other` is broadcast.
    pub(crate) fn broadcast_plus(&self, other: &Self) -> Self {
        self.plus(&other.broadcast_as(self.dims()))
    }
}

/// [`crate::nn::sigmoid`].
pub(crate) fn sigmoid(x: &DryTensor) -> DryTensor {
    x.affine().tanh().affine().affine()
}
