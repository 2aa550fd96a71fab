//! Matrix products by cuBLAS: any row length, stacks of matrices, f32 or bf16 factors, sums in f32.
//!
//! Not candle's product, which takes no heads that lie side by side, adds to nothing and gives bf16 for bf16: a
//! weight's gradient has to come out in f32.

use candle_core::cuda_backend::cudarc::cublas::{result, sys};

use super::{Buffer, CudaDevice, DType, Result, View, WrapErr, allows_tf32, bail};
use crate::ops::cpu::Into;

mod epilogue;
pub(super) use epilogue::product_and;

/// A stack of matrices: element `(i, j)` of matrix `b` lies `b * stride + i * row + j` elements behind `address`, or
/// `b * stride + j * row + i` if transposed.
#[derive(Clone, Copy)]
pub(super) struct Mat {
    address: u64,
    dtype: DType,
    row: usize,
    stride: usize,
    transposed: bool,
}

impl Mat {
    /// The rows of a tensor, each of length `row`.
    pub(super) fn view(view: &View, row: usize) -> Self {
        Self { address: view.address, dtype: view.dtype, row, stride: 0, transposed: false }
    }

    /// The rows of a buffer, each of length `row`.
    pub(super) fn buffer(buffer: &Buffer, row: usize) -> Self {
        Self { address: buffer.address, dtype: buffer.dtype, row, stride: 0, transposed: false }
    }

    /// Begins `offset` elements later.
    pub(super) fn at(self, offset: usize) -> Self {
        Self { address: self.address + (offset * self.dtype.size_in_bytes()) as u64, ..self }
    }

    /// One matrix every `stride` elements.
    pub(super) fn every(self, stride: usize) -> Self {
        Self { stride, ..self }
    }

    /// Each matrix transposed.
    pub(super) fn t(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }
}

/// `batch` products of `[m, k]` and `[k, n]`.
#[derive(Clone, Copy)]
pub(super) struct Size {
    pub(crate) batch: usize,
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
}

impl Size {
    /// One product.
    pub(super) fn one(m: usize, n: usize, k: usize) -> Self {
        Self { batch: 1, m, n, k }
    }
}

/// `to = a b`, or `to += a b`, matrix by matrix. `a` and `b` are of one dtype, `to` is of it or f32, and not
/// transposed.
///
/// The matrices must lie within their tensors: the callers' sizes say so.
pub(super) fn product(
    device: &CudaDevice,
    to: Mat,
    into: Into,
    size: Size,
    (a, b): (Mat, Mat),
) -> Result<()> {
    if size.batch == 0 || size.m == 0 || size.n == 0 {
        return Ok(());
    }
    let call = Call::new(to, size, a, b)?;
    let (alpha, beta) = (1.0_f32, if into == Into::Add { 1.0_f32 } else { 0.0 });
    let computing = if a.dtype == DType::F32 && allows_tf32(device) {
        sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32
    } else {
        sys::cublasComputeType_t::CUBLAS_COMPUTE_32F
    };
    let operation =
        |t| if t { sys::cublasOperation_t::CUBLAS_OP_T } else { sys::cublasOperation_t::CUBLAS_OP_N };
    device.cuda_stream().context().bind_to_thread().w()?;
    let blas = device.cublas_handle();
    // SAFETY: the addresses are those of views and buffers that the caller holds; alpha and beta are f32, as
    // either compute type wants them. Both sum in f32; the FAST one alone rounds f32 factors to TF32.
    unsafe {
        result::gemm_strided_batched_ex(
            *blas.handle(),
            operation(call.transposed[0]),
            operation(call.transposed[1]),
            call.m,
            call.n,
            call.k,
            std::ptr::from_ref(&alpha).cast(),
            call.address[0] as *const _,
            call.dtype[0],
            call.row[0],
            call.stride[0],
            call.address[1] as *const _,
            call.dtype[1],
            call.row[1],
            call.stride[1],
            std::ptr::from_ref(&beta).cast(),
            call.address[2] as *mut _,
            call.dtype[2],
            call.row[2],
            call.stride[2],
            call.batch,
            computing,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
        .w()
    }
}

/// Forbids cuBLAS to add parts of a bf16 product in bf16.
pub(super) fn prepare(device: &CudaDevice) -> Result<()> {
    let mode = sys::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
    // SAFETY: the device keeps the handle alive.
    unsafe { sys::cublasSetMathMode(*device.cublas_handle().handle(), mode) }.result().w()
}

/// What cuBLAS is asked for. It reads matrices by columns, so to it each of ours is its transpose, and
/// `to^T = b^T a^T`: the second factor comes first, and `m` is the number of our columns.
#[derive(Debug)]
struct Call {
    transposed: [bool; 2],
    m: i32,
    n: i32,
    k: i32,
    batch: i32,
    /// First factor, second factor, result.
    address: [u64; 3],
    dtype: [sys::cudaDataType; 3],
    row: [i32; 3],
    stride: [i64; 3],
}

impl Call {
    fn new(to: Mat, size: Size, a: Mat, b: Mat) -> Result<Self> {
        let whole = |n: usize| match i32::try_from(n) {
            Ok(n) => Ok(n),
            Err(_) => bail!("a matrix product of size {n} is too large"),
        };
        let factors = [b, a, to];
        Ok(Self {
            transposed: [b.transposed, a.transposed],
            m: whole(size.n)?,
            n: whole(size.m)?,
            k: whole(size.k)?,
            batch: whole(size.batch)?,
            address: factors.map(|mat| mat.address),
            dtype: [data_type(b.dtype)?, data_type(a.dtype)?, data_type(to.dtype)?],
            row: [whole(b.row)?, whole(a.row)?, whole(to.row)?],
            stride: factors.map(|mat| mat.stride as i64),
        })
    }
}

fn data_type(dtype: DType) -> Result<sys::cudaDataType> {
    match dtype {
        DType::F32 => Ok(sys::cudaDataType::CUDA_R_32F),
        DType::BF16 => Ok(sys::cudaDataType::CUDA_R_16BF),
        other => bail!("no matrix product of {other:?}; wanted f32 or bf16"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// cuBLAS's definition of the call, on the CPU: matrices by columns, addresses as places in `memory`.
    fn interpret(call: &Call, memory: &mut [f32]) {
        let element = |which: usize, batch: i32, i: i32, j: i32| {
            let at = i64::from(i) + i64::from(j) * i64::from(call.row[which]);
            (call.address[which] as i64 / 4 + i64::from(batch) * call.stride[which] + at) as usize
        };
        for batch in 0..call.batch {
            for (i, j) in (0..call.m).flat_map(|i| (0..call.n).map(move |j| (i, j))) {
                let term = |p| {
                    let a =
                        if call.transposed[0] { element(0, batch, p, i) } else { element(0, batch, i, p) };
                    let b =
                        if call.transposed[1] { element(1, batch, j, p) } else { element(1, batch, p, j) };
                    memory[a] * memory[b]
                };
                let sum = (0..call.k).map(term).sum();
                memory[element(2, batch, i, j)] = sum;
            }
        }
    }

    #[test]
    fn the_call_for_each_transposition_gives_our_product() {
        let (batch, m, n, k) = (2, 3, 4, 5);
        // Rows are longer than the matrices, as those of one head among several are.
        for (a_t, b_t) in [(false, false), (false, true), (true, false), (true, true)] {
            let (a_rows, a_row) = if a_t { (k, m + 2) } else { (m, k + 2) };
            let (b_rows, b_row) = if b_t { (n, k + 1) } else { (k, n + 1) };
            let (a_len, b_len) = (batch * a_rows * a_row, batch * b_rows * b_row);
            let mut memory: Vec<f32> =
                (0..a_len + b_len + batch * m * n).map(|i| (i % 7) as f32 - 3.0).collect();
            let mat = |at: usize, row, stride, transposed| {
                Mat { address: 0, dtype: DType::F32, row, stride, transposed }.at(at)
            };
            let a = mat(0, a_row, a_rows * a_row, a_t);
            let b = mat(a_len, b_row, b_rows * b_row, b_t);
            let to = mat(a_len + b_len, n, m * n, false);
            let before = memory.clone();
            interpret(&Call::new(to, Size { batch, m, n, k }, a, b).unwrap(), &mut memory);
            for (z, i, j) in (0..batch).flat_map(|z| (0..m).flat_map(move |i| (0..n).map(move |j| (z, i, j))))
            {
                let at = |mat: Mat, i: usize, j: usize| {
                    let (i, j) = if mat.transposed { (j, i) } else { (i, j) };
                    before[mat.address as usize / 4 + z * mat.stride + i * mat.row + j]
                };
                let wanted: f32 = (0..k).map(|p| at(a, i, p) * at(b, p, j)).sum();
                assert!((memory[a_len + b_len + (z * m + i) * n + j] - wanted).abs() < 1e-6);
            }
        }
    }
}
