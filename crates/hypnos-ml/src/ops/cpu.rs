//! What the CPU kernels share: views of tensors as slices, matrix products, parallel loops and vectorisable
//! elementary functions.
#![allow(unsafe_code)] // gemm takes raw pointers; tiles of one matrix are written from several threads

use std::ops::{Deref, Range};

use candle_core::{CpuStorage, Result, Storage, StorageRef, Tensor, bail};
use rayon::prelude::*;

/// A contiguous f32 tensor on the CPU, read as a slice.
pub(super) struct View<'a> {
    storage: StorageRef<'a>,
    range: Range<usize>,
}

impl<'a> View<'a> {
    /// Errors if the tensor is not contiguous f32 on the CPU.
    pub(super) fn of(tensor: &'a Tensor, what: &str) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("{what}: wanted a contiguous tensor, got strides {:?}", layout.stride());
        };
        match &*storage {
            Storage::Cpu(CpuStorage::F32(_)) => Ok(Self { storage, range: start..end }),
            Storage::Cpu(other) => {
                use candle_core::backend::BackendStorage;
                bail!("{what}: wanted f32 on the CPU, got {:?}", other.dtype())
            }
            _ => bail!("{what}: wanted a tensor on the CPU"),
        }
    }
}

impl Deref for View<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.range.clone()],
            _ => &[],
        }
    }
}

/// A matrix to read: element `(i, j)` is `data[i * row + j * col]`.
#[derive(Clone, Copy)]
pub(super) struct Mat<'a> {
    data: &'a [f32],
    row: usize,
    col: usize,
}

impl<'a> Mat<'a> {
    /// Rows one after the other, `row` elements apart.
    pub(super) fn rows(data: &'a [f32], row: usize) -> Self {
        Self { data, row, col: 1 }
    }

    /// The same matrix, transposed.
    pub(super) fn t(self) -> Self {
        Self { data: self.data, row: self.col, col: self.row }
    }

    fn holds(&self, n_rows: usize, n_cols: usize) -> bool {
        n_rows == 0 || n_cols == 0 || (n_rows - 1) * self.row + (n_cols - 1) * self.col < self.data.len()
    }
}

/// What a product does with the old content of its destination.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Into {
    Replace,
    Add,
}

/// Whether a product may use every thread or stays on the calling one.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Threads {
    All,
    One,
}

/// `dst = [dst +] scale * a b`, where `a` is `m x k`, `b` is `k x n` and row `i` of `dst` begins at `i * dst_row`.
pub(super) fn gemm(
    dst: &mut [f32],
    dst_row: usize,
    into: Into,
    (m, n, k): (usize, usize, usize),
    (a, b): (Mat, Mat),
    scale: f32,
    threads: Threads,
) {
    assert!(m == 0 || n == 0 || (m - 1) * dst_row + n <= dst.len(), "gemm: destination too small");
    let dst = Tiles { data: dst.as_mut_ptr(), len: dst.len() };
    // SAFETY: the destination is borrowed mutably for the whole call.
    unsafe { dst.gemm(0, dst_row, into, (m, n, k), (a, b), scale, threads) }
}

/// `scale * a b` as rows of `n`, on all threads; see [`gemm()`]. Memory that is written whole need not be cleared
/// first.
pub(super) fn product((m, n, k): (usize, usize, usize), factors: (Mat, Mat), scale: f32) -> Vec<f32> {
    if k == 0 {
        return zeros(m * n);
    }
    let mut values = Vec::with_capacity(m * n);
    let dst = Tiles { data: values.as_mut_ptr(), len: m * n };
    // SAFETY: the capacity is `m * n`, nobody else knows of it, and a product that replaces writes every element
    // without reading any.
    unsafe {
        dst.gemm(0, n, Into::Replace, (m, n, k), factors, scale, Threads::All);
        values.set_len(m * n);
    }
    values
}

/// A matrix whose disjoint parts are written from several threads.
#[derive(Clone, Copy)]
pub(super) struct Tiles {
    data: *mut f32,
    len: usize,
}

// SAFETY: the pointer is only written through the unsafe methods, whose callers promise disjoint parts.
unsafe impl Send for Tiles {}
// SAFETY: as above.
unsafe impl Sync for Tiles {}

impl Tiles {
    pub(super) fn new(data: &mut [f32]) -> Self {
        Self { data: data.as_mut_ptr(), len: data.len() }
    }

    /// [`gemm()`] into the part that begins at `start`.
    ///
    /// # Safety
    /// The slice given to [`Tiles::new`] is alive, and no other thread touches the elements written here.
    pub(super) unsafe fn gemm(
        self,
        start: usize,
        dst_row: usize,
        into: Into,
        (m, n, k): (usize, usize, usize),
        (a, b): (Mat, Mat),
        scale: f32,
        threads: Threads,
    ) {
        if m == 0 || n == 0 {
            return;
        }
        assert!(start + (m - 1) * dst_row + n <= self.len, "gemm: destination too small");
        assert!(a.holds(m, k) && b.holds(k, n), "gemm: a factor is too small for {m} x {k} x {n}");
        let parallelism = match threads {
            Threads::All => gemm::Parallelism::Rayon(0),
            Threads::One => gemm::Parallelism::None,
        };
        // SAFETY: the bounds of all three matrices were just checked; aliasing is the caller's promise.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                self.data.add(start),
                1,
                dst_row as isize,
                into == Into::Add,
                a.data.as_ptr(),
                a.col as isize,
                a.row as isize,
                b.data.as_ptr(),
                b.col as isize,
                b.row as isize,
                1.0,
                scale,
                false,
                false,
                false,
                parallelism,
            );
        }
    }
}

/// Elements that one thread takes at a time in [`par_chunks`]: large enough to hide the cost of handing them out.
const CHUNK: usize = 1 << 14;

/// Calls `f(range, part)` for consecutive parts of `out`, in parallel.
pub(super) fn par_chunks(out: &mut [f32], f: impl Fn(Range<usize>, &mut [f32]) + Sync) {
    out.par_chunks_mut(CHUNK).enumerate().for_each(|(i, part)| {
        let start = i * CHUNK;
        f(start..start + part.len(), part);
    });
}

/// `n` zeros.
pub(super) fn zeros(n: usize) -> Vec<f32> {
    vec![0.0; n]
}

const LANES: usize = 16;

/// Sum of `f` over pairs of elements, in f32 lanes within blocks and in f64 across them.
#[inline]
pub(super) fn sum2(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f64 {
    let mut total = 0.0_f64;
    for (a, b) in a.chunks(1024).zip(b.chunks(1024)) {
        let mut lanes = [0.0_f32; LANES];
        let (a_wide, b_wide) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
        let rest: f64 =
            a_wide.remainder().iter().zip(b_wide.remainder()).map(|(&x, &y)| f64::from(f(x, y))).sum();
        for (x, y) in a_wide.zip(b_wide) {
            for i in 0..LANES {
                lanes[i] += f(x[i], y[i]);
            }
        }
        total += lanes.iter().map(|&lane| f64::from(lane)).sum::<f64>() + rest;
    }
    total
}

/// Sum of `f` over elements, as [`sum2`].
#[inline]
pub(super) fn sum(a: &[f32], f: impl Fn(f32) -> f32) -> f64 {
    sum2(a, a, |x, _| f(x))
}

/// Mean and 1 / sqrt(variance + eps) of a slice.
pub(super) fn moments(x: &[f32], eps: f64) -> (f32, f32) {
    let n = x.len() as f64;
    let mean = sum(x, |v| v) / n;
    let mean_f32 = mean as f32;
    let variance = sum(x, |v| (v - mean_f32) * (v - mean_f32)) / n;
    (mean_f32, (1.0 / (variance + eps).sqrt()) as f32)
}

/// e^x within 2 ulp, as straight-line arithmetic that the compiler turns into vector instructions.
#[inline]
pub(super) fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.3, 88.7);
    let n = (x * std::f32::consts::LOG2_E).round_ties_even();
    // ln 2 in two parts, so that the remainder is exact.
    let r = n.mul_add(-1.428_606_8e-6, n.mul_add(-0.693_145_75, x));
    let p = r.mul_add(1.987_569_1e-4, 1.398_199_9e-3);
    let p = r.mul_add(p, 8.333_452e-3);
    let p = r.mul_add(p, 4.166_579_6e-2);
    let p = r.mul_add(p, 1.666_666_5e-1);
    let p = r.mul_add(p, 0.5);
    let e = (r * r).mul_add(p, r + 1.0);
    e * f32::from_bits((((n as i32) + 127) as u32) << 23)
}

/// The error function within a few ulp: a rational approximation in x^2, odd by construction.
#[inline]
pub(super) fn erf(x: f32) -> f32 {
    let x = x.clamp(-4.0, 4.0);
    let s = x * x;
    let p = s.mul_add(-2.726_142_3e-10, 2.770_681_5e-8);
    let p = s.mul_add(p, -2.101_024e-6);
    let p = s.mul_add(p, -5.692_506_4e-5);
    let p = s.mul_add(p, -7.349_906_4e-4);
    let p = s.mul_add(p, -2.954_6e-3);
    let p = s.mul_add(p, -1.609_603_4e-2);
    let q = s.mul_add(-1.456_607_2e-5, -2.133_740_6e-4);
    let q = s.mul_add(q, -1.682_827e-3);
    let q = s.mul_add(q, -7.373_329e-3);
    let q = s.mul_add(q, -1.426_473_9e-2);
    x * p / q
}

/// 1 / (1 + e^-x).
#[inline]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_agrees_with_the_library() {
        for i in -8700..8800 {
            let x = i as f32 / 100.0;
            let want = f64::from(x).exp();
            assert!((f64::from(exp(x)) - want).abs() <= 3e-7 * want, "exp({x})");
        }
    }

    #[test]
    fn the_error_function_agrees_with_its_series() {
        for i in -600..=600_i32 {
            let x = f64::from(i) / 150.0;
            // erf x = 2/sqrt(pi) sum (-1)^n x^(2n+1) / (n! (2n+1)), in f64 exact enough up to |x| = 4
            let (mut term, mut series) = (x, x);
            for n in 1..200 {
                term *= -x * x / f64::from(n);
                series += term / f64::from(2 * n + 1);
            }
            let want = series * std::f64::consts::FRAC_2_SQRT_PI;
            assert!((f64::from(erf(x as f32)) - want).abs() <= 4e-7, "erf({x}) {} {want}", erf(x as f32));
        }
    }

    #[test]
    fn a_product_honours_strides_scale_and_the_old_content() {
        let a = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let b = [1.0, 0.0, 2.0, 1.0, 0.0, 3.0];
        let mut dst = vec![10.0; 6];
        gemm(&mut dst, 3, Into::Add, (2, 2, 3), (Mat::rows(&a, 3), Mat::rows(&b, 2)), 2.0, Threads::One);
        assert_eq!(dst, [20.0, 32.0, 10.0, 38.0, 56.0, 10.0]);
        let mut dst = vec![0.0; 9];
        gemm(
            &mut dst,
            3,
            Into::Replace,
            (3, 3, 2),
            (Mat::rows(&a, 3).t(), Mat::rows(&b, 3)),
            1.0,
            Threads::All,
        );
        assert_eq!(dst, [5.0, 0.0, 14.0, 7.0, 0.0, 19.0, 9.0, 0.0, 24.0]);
    }
}
