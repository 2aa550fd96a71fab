//! A tensor of a pickle: which numbers of which storage it is made of, and where that storage lies in the file.

use std::fs::File;
use std::os::unix::fs::FileExt;

use safetensors::Dtype;

use super::machine::{Storage, Tensor};
use crate::error::io_words;
use crate::tensorfile::widening;

/// A tensor that lies within a file.
#[derive(Debug)]
pub(super) struct Stored {
    pub(super) shape: Vec<usize>,
    strides: Vec<usize>,
    pub(super) dtype: Dtype,
    /// Its first number, in bytes from the beginning of the file.
    begin: u64,
    /// How many numbers of its storage it spans, from the first to the last.
    span: usize,
}

/// How many bytes a storage takes, if that is a number at all.
pub(super) fn bytes(storage: &Storage<'_>) -> Option<u64> {
    (storage.n as u64).checked_mul(width(storage.dtype))
}

fn width(dtype: Dtype) -> u64 {
    dtype.bitsize() as u64 / 8
}

impl Stored {
    /// The tensor in its storage, whose values begin at `begin` and all lie within the file. What is wrong with it, if
    /// it does not lie within its storage, or has more numbers than that.
    pub(super) fn new(tensor: &Tensor<'_>, begin: u64) -> Result<Self, String> {
        let Tensor { shape, strides, offset, storage } = tensor;
        let odd = || format!("has the impossible shape {shape:?} with strides {strides:?}");
        let n = shape.iter().try_fold(1_usize, |n, d| n.checked_mul(*d)).ok_or_else(odd)?;
        if shape.len() != strides.len() {
            return Err(odd());
        }
        let mut steps = shape.iter().zip(strides).map(|(d, s)| d.saturating_sub(1).checked_mul(*s));
        let last = steps.try_fold(0_usize, |last, step| last.checked_add(step?)).ok_or_else(odd)?;
        let span = if n == 0 { 0 } else { last.checked_add(1).ok_or_else(odd)? };
        let end = offset.checked_add(span).ok_or_else(odd)?;
        if end > storage.n || n > storage.n {
            let what = format!("{shape:?} with strides {strides:?} from {offset} on");
            return Err(format!("is {what}, but its storage has {} numbers", storage.n));
        }
        let before = (*offset as u64).checked_mul(width(storage.dtype));
        let begin = before.and_then(|before| begin.checked_add(before)).ok_or_else(odd)?;
        Ok(Self { shape: shape.clone(), strides: strides.clone(), dtype: storage.dtype, begin, span })
    }

    /// Its values, row-major.
    pub(super) fn read(&self, file: &File) -> Result<Vec<f32>, String> {
        let (width, widen) = widening(self.dtype)
            .ok_or_else(|| format!("has type {:?}; F32, F16, BF16 or F64 is wanted", self.dtype))?;
        let n_bytes = self.span.checked_mul(width).ok_or("takes more bytes than a file can have")?;
        let mut bytes = vec![0; n_bytes];
        file.read_exact_at(&mut bytes, self.begin)
            .map_err(|e| format!("cannot be read: {}", io_words(&e)))?;
        let mut values = vec![0.0; self.span];
        widen(&bytes, &mut values);
        if values.is_empty() {
            return Ok(values);
        }
        let dense = dense(&self.shape);
        // The stride of an axis with one place says nothing.
        let as_they_lie = |((d, s), wanted): ((&usize, &usize), &usize)| *d <= 1 || s == wanted;
        if self.shape.iter().zip(&self.strides).zip(&dense).all(as_they_lie) {
            return Ok(values);
        }
        let n: usize = self.shape.iter().product();
        let place = |i: usize| {
            let axes = self.shape.iter().zip(&self.strides).zip(&dense);
            axes.map(|((d, s), step)| i / step % d * s).sum::<usize>()
        };
        Ok((0..n).map(|i| values[place(i)]).collect())
    }
}

/// The strides of a row-major tensor that is not empty.
fn dense(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis];
    }
    strides
}
