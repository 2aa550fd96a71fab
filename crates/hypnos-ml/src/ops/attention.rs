//! Scaled dot-product attention over several heads.

use candle_core::{DType, Device, Result, Tensor, bail};
use rayon::prelude::*;

use super::cpu::{Into, Mat, Threads, Tiles, View, gemm, sum2, zeros};
use super::custom_op::{Computed, custom_op_with_result};
use super::softmax::softmax_row;
use crate::dry_run::{Cost, DryTensor};

/// `softmax(q k^T / sqrt(K)) v`, head by head (Vaswani et al. 2017, arXiv 1706.03762, eq. 1).
///
/// * `q` `[B, L, N K]`, `k` and `v` `[B, S, N K]`: heads side by side in the last dimension, as the projections leave
///   them, so nothing is transposed
/// * `n_heads` is `N`
/// * `causal`: a query sees keys up to its own place only
///
/// Gives `[B, L, N K]`. Differentiable in all three. The score matrix is never kept: forward works on tiles of queries,
/// backward computes them again. On a GPU, bf16 with heads of 40, 64, 80, 160 or 512 goes through kernels whose tiles
/// stay on the chip; these keep a number for each query and head for the backward, f32 `[B, N, L]`, and leave out what
/// only gradients of untracked inputs need. Anything else there goes through memory in chunks of queries.
///
/// Errors if the shapes or the dtypes do not fit each other, and if the device has no kernel for the dtype.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, n_heads: usize, causal: bool) -> Result<Tensor> {
    let ((b, l, d), (b_k, s, d_k)) = (q.dims3()?, k.dims3()?);
    if b != b_k || d != d_k || k.dims() != v.dims() || n_heads == 0 || d % n_heads != 0 {
        bail!("attention: {n_heads} heads over q {:?}, k {:?}, v {:?}", q.dims(), k.dims(), v.dims());
    }
    let dtypes = [q, k, v].map(Tensor::dtype);
    if dtypes.iter().any(|dtype| *dtype != dtypes[0]) {
        bail!("attention: wanted q, k and v of one dtype, got {dtypes:?}");
    }
    let (q, k, v) = (q.contiguous()?, k.contiguous()?, v.contiguous()?);
    let heads = Heads { b, l, s, d, n: n_heads, causal };
    let (value, log_sum_exp): (Computed, Option<Tensor>) = match q.device() {
        Device::Cpu => (heads.forward(&q, &k, &v)?, None),
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => super::cuda::attention([&q, &k, &v], &heads)?,
        other => bail!("attention: no kernel for {other:?}"),
    };
    let inputs = [q.clone(), k.clone(), v.clone()];
    custom_op_with_result("attention", &[&q, &k, &v], value, move |y, dy| {
        let [q, k, v] = &inputs;
        let [dq, dk, dv] = match (dy.device(), (y, log_sum_exp.as_ref())) {
            (Device::Cpu, _) => heads.backward(q, k, v, dy)?.map(Some),
            #[cfg(feature = "cuda")]
            (Device::Cuda(_), forward) => super::cuda::attention_backward([q, k, v], forward, dy, &heads)?,
            (other, _) => bail!("attention: no kernel for {other:?}"),
        };
        let of_tracked =
            |x: &Tensor, grad: Option<Computed>| grad.filter(|_| x.track_op()).map(Computed::detached);
        Ok([of_tracked(q, dq), of_tracked(k, dk), of_tracked(v, dv)])
    })
}

/// [`attention()`] in a dry run. Queries, keys and values are kept, and no score: the backward works with them tile by
/// tile once more. Where it is not fused it makes all three gradients, wanted or not.
pub(crate) fn dry(q: &DryTensor, k: &DryTensor, v: &DryTensor, n_heads: usize) -> DryTensor {
    let (q, k, v) = (q.contiguous(), k.contiguous(), v.contiguous());
    let ([b, l, d], s) = ([0, 1, 2].map(|axis| q.dims()[axis]), k.dims()[1]);
    let heads = Heads { b, l, s, d, n: n_heads, causal: false };
    let flops = 4.0 * (b * d) as f64 * l as f64 * s as f64;
    let is_bf16 = q.dtype() == DType::BF16;
    if q.meter().on_gpu() && heads.is_fused(q.dtype()) {
        let of_queries = DryTensor::constant(q.meter(), &[b, n_heads, l]); // the logarithms of sums, which are kept
        let unwanted = if k.is_tracked() == v.is_tracked() { 0 } else { k.bytes() };
        let backward_scratch = of_queries.bytes() + unwanted;
        let cost = Cost { flops, input_flops: 2.5 * flops, backward_scratch, ..Cost::default() };
        return q.custom(&[&q, &k, &v, &of_queries], q.dims(), cost);
    }
    let unwanted = [&q, &k, &v].into_iter().filter(|x| !x.is_tracked()).map(DryTensor::bytes).sum::<u64>();
    let (scratch, again) = if q.meter().on_gpu() {
        let narrowed = if is_bf16 { heads.chunk_bytes() / 2 } else { 0 }; // the probabilities
        (heads.chunk_bytes() + narrowed, 3 * heads.chunk_bytes())
    } else {
        (heads.tile_bytes(), 2 * heads.tile_bytes())
    };
    // The scores once more, then two products for each of the forward's.
    let (input_flops, backward_scratch) = (2.5 * flops, again + unwanted);
    let cost = Cost { flops, input_flops, scratch, backward_scratch, ..Cost::default() };
    q.custom(&[&q, &k, &v], q.dims(), cost)
}

/// Sizes of one attention.
#[derive(Clone, Copy)]
pub(super) struct Heads {
    pub(crate) b: usize,
    /// Queries.
    pub(crate) l: usize,
    /// Keys.
    pub(crate) s: usize,
    /// Width of all heads together.
    pub(crate) d: usize,
    pub(crate) n: usize,
    pub(crate) causal: bool,
}

/// The widths of a head that a GPU's fused kernels are made for.
pub(super) const FUSED_WIDTHS: [usize; 5] = [40, 64, 80, 160, 512];

/// Scores that one tile of queries may have: half a megabyte of f32 stays in a core's cache.
const TILE_SCORES: usize = 1 << 17;

/// Most bytes that the scores of one chunk take on a GPU, unless a single query needs more. Backward holds three such.
pub(super) const CHUNK_BYTES_MOST: usize = 256 << 20;

impl Heads {
    pub(super) fn width(&self) -> usize {
        self.d / self.n
    }

    /// Whether a GPU has fused kernels for these heads of tensors of `dtype`.
    pub(super) fn is_fused(&self, dtype: DType) -> bool {
        dtype == DType::BF16 && self.s > 0 && FUSED_WIDTHS.contains(&self.width())
    }

    pub(super) fn scale(&self) -> f32 {
        1.0 / (self.width() as f32).sqrt()
    }

    /// Queries in one tile.
    fn tile(&self) -> usize {
        (TILE_SCORES / self.s.max(1)).clamp(16, 256).min(self.l.max(1))
    }

    /// Bytes of the scores of a tile on every thread.
    fn tile_bytes(&self) -> u64 {
        let n_threads =
            rayon::current_num_threads().min(self.b * self.n * self.l.div_ceil(self.tile()).max(1));
        4 * (n_threads * self.tile() * self.s) as u64
    }

    /// Bytes of the scores of a chunk on a GPU.
    fn chunk_bytes(&self) -> u64 {
        4 * (self.n * self.queries_per_chunk() * self.s) as u64
    }

    /// Queries that a GPU takes at once.
    pub(super) fn queries_per_chunk(&self) -> usize {
        (CHUNK_BYTES_MOST / (4 * self.n * self.s).max(1)).clamp(1, self.l.max(1))
    }

    /// Where the rows of image `b`, head `h` begin in a tensor with `n_rows` rows per image.
    fn at(&self, b: usize, h: usize, n_rows: usize) -> usize {
        b * n_rows * self.d + h * self.width()
    }

    /// Probabilities of the queries `from..from + n`, into `p` `[n, S]`.
    fn probabilities(&self, p: &mut [f32], q: &[f32], k: &[f32], from: usize, n: usize, threads: Threads) {
        let (d, s) = (self.d, self.s);
        let factors = (Mat::rows(&q[from * d..], d), Mat::rows(k, d).t());
        gemm(p, s, Into::Replace, (n, s, self.width()), factors, self.scale(), threads);
        let finish = |i: usize, row: &mut [f32]| {
            if self.causal {
                row.iter_mut().skip(from + i + 1).for_each(|score| *score = f32::NEG_INFINITY);
            }
            softmax_row(row);
        };
        if threads == Threads::All {
            p.par_chunks_mut(s).take(n).enumerate().for_each(|(i, row)| finish(i, row));
        } else {
            p.chunks_mut(s).take(n).enumerate().for_each(|(i, row)| finish(i, row));
        }
    }

    #[allow(unsafe_code)]
    fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Computed> {
        let (q, k, v) = (View::of(q, "attention")?, View::of(k, "attention")?, View::of(v, "attention")?);
        let (q, k, v) = (&q[..], &k[..], &v[..]);
        let (d, tile) = (self.d, self.tile());
        let mut y = zeros(q.len());
        let out = Tiles::new(&mut y);
        let n_tiles = self.l.div_ceil(tile);
        (0..self.b * self.n * n_tiles).into_par_iter().for_each_init(
            || zeros(tile * self.s),
            |p, task| {
                let (b, h, from) = (task / n_tiles / self.n, task / n_tiles % self.n, task % n_tiles * tile);
                let n = tile.min(self.l - from);
                let (q_at, k_at) = (self.at(b, h, self.l), self.at(b, h, self.s));
                self.probabilities(p, &q[q_at..], &k[k_at..], from, n, Threads::One);
                let factors = (Mat::rows(p, self.s), Mat::rows(&v[k_at..], d));
                let size = (n, self.width(), self.s);
                // SAFETY: each task writes its own rows of its own head.
                unsafe { out.gemm(q_at + from * d, d, Into::Replace, size, factors, 1.0, Threads::One) }
            },
        );
        Ok(Computed::cpu(y, (self.b, self.l, self.d)))
    }

    #[allow(unsafe_code)]
    fn backward(&self, q: &Tensor, k: &Tensor, v: &Tensor, dy: &Tensor) -> Result<[Computed; 3]> {
        let (q, k, v) = (View::of(q, "attention")?, View::of(k, "attention")?, View::of(v, "attention")?);
        let dy = View::of(dy, "attention")?;
        let (q, k, v, dy) = (&q[..], &k[..], &v[..], &dy[..]);
        let (d, s, width, tile) = (self.d, self.s, self.width(), self.tile());
        let (mut dq, mut dk, mut dv) = (zeros(q.len()), zeros(k.len()), zeros(v.len()));
        let [dq_out, dk_out, dv_out] = [Tiles::new(&mut dq), Tiles::new(&mut dk), Tiles::new(&mut dv)];
        let n_tasks = self.b * self.n;
        // With fewer heads than threads, the threads share each product instead.
        let threads = if n_tasks < rayon::current_num_threads() { Threads::All } else { Threads::One };
        let head = |(p, dp): &mut (Vec<f32>, Vec<f32>), task: usize| {
            let (b, h) = (task / self.n, task % self.n);
            let (q_at, k_at) = (self.at(b, h, self.l), self.at(b, h, s));
            let (k, v) = (&k[k_at..], &v[k_at..]);
            for from in (0..self.l).step_by(tile) {
                let n = tile.min(self.l - from);
                self.probabilities(p, &q[q_at..], k, from, n, threads);
                let at = q_at + from * d;
                let (q, dy) = (Mat::rows(&q[at..], d), Mat::rows(&dy[at..], d));
                gemm(dp, s, Into::Replace, (n, s, width), (dy, Mat::rows(v, d).t()), 1.0, threads);
                // SAFETY: each task writes its own head of its own image.
                unsafe {
                    dv_out.gemm(k_at, d, Into::Add, (s, width, n), (Mat::rows(p, s).t(), dy), 1.0, threads);
                }
                for (p, dp) in p.chunks(s).zip(dp.chunks_mut(s)).take(n) {
                    let dot = sum2(p, dp, |p, dp| p * dp) as f32;
                    dp.iter_mut().zip(p).for_each(|(dp, p)| *dp = p * (*dp - dot));
                }
                let (ds, scale) = (Mat::rows(dp, s), self.scale());
                // SAFETY: as above.
                unsafe {
                    dq_out.gemm(at, d, Into::Replace, (n, width, s), (ds, Mat::rows(k, d)), scale, threads);
                    dk_out.gemm(k_at, d, Into::Add, (s, width, n), (ds.t(), q), scale, threads);
                }
            }
        };
        let scratch = || (zeros(tile * s), zeros(tile * s));
        if threads == Threads::All {
            let mut scratch = scratch();
            (0..n_tasks).for_each(|task| head(&mut scratch, task));
        } else {
            (0..n_tasks).into_par_iter().for_each_init(scratch, head);
        }
        let (l, b) = (self.l, self.b);
        Ok([Computed::cpu(dq, (b, l, d)), Computed::cpu(dk, (b, s, d)), Computed::cpu(dv, (b, s, d))])
    }
}
