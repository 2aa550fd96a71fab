//! Attention: fused where `fused_attention.rs` has the kernels, else as matrix products over chunks of queries, so that
//! no score matrix is ever whole.
//!
//! A chunk goes through memory once. Its scores are f32 even where the inputs are bf16.

use super::fused_attention::Fused;
use super::matmul::{Mat, Size, product};
use super::softmax::{probabilities, scores_gradient};
use super::{Buffer, Computed, CudaDevice, DType, Result, Tensor, View};
use crate::ops::attention::Heads;
use crate::ops::cpu::Into;

/// Queries `from..from + n` of one image, in all its heads.
#[derive(Clone, Copy)]
struct Chunk {
    image: usize,
    from: usize,
    n: usize,
}

impl Chunk {
    /// Where the first query's row begins.
    fn row(&self, heads: &Heads) -> usize {
        (self.image * heads.l + self.from) * heads.d
    }

    /// Where the image's first key begins.
    fn keys(&self, heads: &Heads) -> usize {
        self.image * heads.s * heads.d
    }

    /// One product per head: `[m, k]` times `[k, n]`.
    fn size(heads: &Heads, m: usize, n: usize, k: usize) -> Size {
        Size { batch: heads.n, m, n, k }
    }

    /// `[n, S]` per head.
    fn scores(&self, heads: &Heads, buffer: &Buffer) -> Mat {
        Mat::buffer(buffer, heads.s).every(self.n * heads.s)
    }

    /// `a b^T` per head, where `a` has this chunk's rows and `b` the image's keys.
    fn against_keys(&self, heads: &Heads, device: &CudaDevice, a: &View, b: &View) -> Result<Buffer> {
        let to = Buffer::new(device, (heads.n, self.n, heads.s), DType::F32)?;
        let factors = (rows(heads, a).at(self.row(heads)), rows(heads, b).at(self.keys(heads)).t());
        let size = Self::size(heads, self.n, heads.s, heads.width());
        product(device, self.scores(heads, &to), Into::Replace, size, factors)?;
        Ok(to)
    }

    fn probabilities(&self, heads: &Heads, device: &CudaDevice, q: &View, k: &View) -> Result<Buffer> {
        let scores = self.against_keys(heads, device, q, k)?;
        probabilities(device, scores, q.dtype, self.from, heads.scale(), heads.causal)
    }
}

impl Heads {
    fn chunks(&self) -> impl Iterator<Item = Chunk> {
        let (l, n) = (self.l, self.queries_per_chunk());
        (0..self.b).flat_map(move |image| {
            (0..l).step_by(n).map(move |from| Chunk { image, from, n: n.min(l - from) })
        })
    }
}

/// A head's part of each row of a `[B, .., N K]` tensor, one head after the other.
fn rows(heads: &Heads, view: &View) -> Mat {
    Mat::view(view, heads.d).every(heads.width())
}

fn buffer_rows(heads: &Heads, buffer: &Buffer) -> Mat {
    Mat::buffer(buffer, heads.d).every(heads.width())
}

/// The result, and what the backward of a fused attention needs of it.
pub(in crate::ops) fn attention(
    [q, k, v]: [&Tensor; 3],
    heads: &Heads,
) -> Result<(Computed, Option<Tensor>)> {
    if let Some(fused) = Fused::of(heads, q.dtype()) {
        let (y, log_sum_exp) = fused.forward(heads, [q, k, v])?;
        return Ok((y, Some(log_sum_exp)));
    }
    let device = q.device().as_cuda_device()?;
    let y = Buffer::new(device, q.dims(), q.dtype())?;
    let (q, k, v) = (View::of(q)?, View::of(k)?, View::of(v)?);
    for chunk in heads.chunks() {
        let p = chunk.probabilities(heads, device, &q, &k)?;
        let factors = (chunk.scores(heads, &p), rows(heads, &v).at(chunk.keys(heads)));
        let to = buffer_rows(heads, &y).at(chunk.row(heads));
        product(device, to, Into::Replace, Chunk::size(heads, chunk.n, heads.width(), heads.s), factors)?;
    }
    Ok((y.computed(), None))
}

/// The gradients of queries, keys and values, at least of those that are tracked. `forward` is what [`attention()`]
/// gave.
pub(in crate::ops) fn attention_backward(
    inputs: [&Tensor; 3],
    forward: (&Tensor, Option<&Tensor>),
    dy: &Tensor,
    heads: &Heads,
) -> Result<[Option<Computed>; 3]> {
    if let (Some(fused), (y, Some(log_sum_exp))) = (Fused::of(heads, inputs[0].dtype()), forward) {
        return fused.backward(heads, inputs, (y, log_sum_exp), dy);
    }
    Ok(chunked_backward(inputs, dy, heads)?.map(Some))
}

/// All three gradients. The probabilities are computed again, chunk by chunk.
fn chunked_backward([q, k, v]: [&Tensor; 3], dy: &Tensor, heads: &Heads) -> Result<[Computed; 3]> {
    let (device, dtype) = (q.device().as_cuda_device()?, q.dtype());
    let dq = Buffer::new(device, q.dims(), dtype)?;
    // These gather a part from every chunk, hence in f32.
    let dk = Buffer::new(device, k.dims(), DType::F32)?;
    let dv = Buffer::new(device, v.dims(), DType::F32)?;
    let (q, k, v, dy) = (View::of(q)?, View::of(k)?, View::of(v)?, View::of(dy)?);
    for chunk in heads.chunks() {
        let (row, keys) = (chunk.row(heads), chunk.keys(heads));
        let into = if chunk.from == 0 { Into::Replace } else { Into::Add };
        let to_keys = Chunk::size(heads, heads.s, heads.width(), chunk.n);
        let p = chunk.probabilities(heads, device, &q, &k)?;
        let factors = (chunk.scores(heads, &p).t(), rows(heads, &dy).at(row));
        product(device, buffer_rows(heads, &dv).at(keys), into, to_keys, factors)?;
        let dp = chunk.against_keys(heads, device, &dy, &v)?;
        let ds = scores_gradient(device, &p, dp, heads.scale())?;
        let factors = (chunk.scores(heads, &ds), rows(heads, &k).at(keys));
        let to_queries = Chunk::size(heads, chunk.n, heads.width(), heads.s);
        product(device, buffer_rows(heads, &dq).at(row), Into::Replace, to_queries, factors)?;
        let factors = (chunk.scores(heads, &ds).t(), rows(heads, &q).at(row));
        product(device, buffer_rows(heads, &dk).at(keys), into, to_keys, factors)?;
    }
    Ok([dq.computed(), narrowed(dk, dtype)?, narrowed(dv, dtype)?])
}

/// The buffer in `dtype`.
fn narrowed(buffer: Buffer, dtype: DType) -> Result<Computed> {
    if buffer.dtype == dtype {
        return Ok(buffer.computed());
    }
    let tensor = buffer.tensor().to_dtype(dtype)?;
    let storage = tensor.storage_and_layout().0.try_clone(tensor.layout())?;
    Ok(Computed { storage, shape: tensor.shape().clone() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::attention::CHUNK_BYTES_MOST;

    #[test]
    fn chunks_cover_every_query_once_within_the_bound() {
        for (b, l, s, n) in [(2, 4096, 4096, 8), (1, 77, 77, 12), (3, 5, 1 << 27, 1), (2, 10_000, 9_999, 3)] {
            let heads = Heads { b, l, s, d: 8 * n, n, causal: false };
            let chunks: Vec<_> = heads.chunks().collect();
            for image in 0..b {
                let mut next = 0;
                for chunk in chunks.iter().filter(|chunk| chunk.image == image) {
                    assert_eq!(chunk.from, next);
                    assert!(chunk.n == 1 || 4 * n * chunk.n * s <= CHUNK_BYTES_MOST);
                    next += chunk.n;
                }
                assert_eq!(next, l);
            }
        }
    }
}
