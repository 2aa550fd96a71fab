//! Launches `attention.cu`: attention whose scores are never in global memory, for bf16 and heads of some widths.
//!
//! Which kernels are launched, and how, depends on shapes and dtype alone.

use candle_core::cuda_backend::cudarc::driver::DeviceRepr;

use super::{Arg, Buffer, Computed, CudaDevice, DType, Grid, Result, Tensor, View, bail, int, launch};
use crate::ops::attention::Heads;

/// How a kernel is launched.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Kernel {
    /// Rows of the result that a block computes for one head: queries, or keys.
    rows: usize,
    threads: usize,
    shared_bytes: usize,
}

const fn kernel(rows: usize, threads: usize, shared_bytes: usize) -> Kernel {
    Kernel { rows, threads, shared_bytes }
}

/// The kernels for heads of one width.
pub(super) struct Fused {
    width: usize,
    forward: Kernel,
    backward_queries: Kernel,
    backward_keys: Kernel,
    /// In place of `backward_keys` for [`FEW_KEYS`] at most.
    backward_few_keys: Option<Kernel>,
}

/// As the last lines of `attention.cu` have them.
static FUSED: [Fused; 5] = [
    Fused {
        width: 40,
        forward: kernel(128, 128, 20_480),
        backward_queries: kernel(128, 128, 20_480),
        backward_keys: kernel(128, 128, 21_504),
        backward_few_keys: Some(kernel(16, 128, 43_008)),
    },
    Fused {
        width: 64,
        forward: kernel(128, 128, 36_864),
        backward_queries: kernel(64, 128, 36_864),
        backward_keys: kernel(64, 128, 37_888),
        backward_few_keys: Some(kernel(16, 128, 37_888)),
    },
    Fused {
        width: 80,
        forward: kernel(64, 128, 45_056),
        backward_queries: kernel(64, 128, 45_056),
        backward_keys: kernel(64, 128, 46_080),
        backward_few_keys: Some(kernel(16, 128, 46_080)),
    },
    Fused {
        width: 160,
        forward: kernel(64, 128, 43_008),
        backward_queries: kernel(64, 128, 43_008),
        backward_keys: kernel(32, 64, 43_264),
        backward_few_keys: None,
    },
    Fused {
        width: 512,
        forward: kernel(64, 256, 74_752),
        backward_queries: kernel(32, 256, 82_944),
        backward_keys: kernel(32, 256, 83_200),
        backward_few_keys: None,
    },
];

const FEW_KEYS: usize = 128;

impl Fused {
    /// The kernels for these heads of tensors of `dtype`, if there are any.
    pub(super) fn of(heads: &Heads, dtype: DType) -> Option<&'static Self> {
        FUSED.iter().find(|fused| heads.is_fused(dtype) && fused.width == heads.width())
    }

    /// The result, and what [`Fused::backward`] needs of this beside it: the logarithm of the sum of each query's
    /// exponentials, f32 `[B, N, L]`.
    pub(super) fn forward(&self, heads: &Heads, inputs: [&Tensor; 3]) -> Result<(Computed, Tensor)> {
        let device = inputs[0].device().as_cuda_device()?;
        let y = Buffer::new(device, (heads.b, heads.l, heads.d), DType::BF16)?;
        let log_sum_exp = Buffer::new(device, (heads.b, heads.n, heads.l), DType::F32)?;
        let [q, k, v] = inputs.map(operand);
        let (q, k, v) = (q?, k?, v?);
        let (q, k, v) = (View::of(&q)?, View::of(&k)?, View::of(&v)?);
        let pointers = [q.arg(), k.arg(), v.arg(), y.arg(), log_sum_exp.arg()];
        self.launch(device, "forward", self.forward, heads, heads.l, &pointers)?;
        Ok((y.computed(), log_sum_exp.tensor()))
    }

    /// The gradients of queries, keys and values, at least of those that are tracked. `y` and `log_sum_exp` are what
    /// [`Fused::forward`] gave.
    pub(super) fn backward(
        &self,
        heads: &Heads,
        inputs: [&Tensor; 3],
        (y, log_sum_exp): (&Tensor, &Tensor),
        dy: &Tensor,
    ) -> Result<[Option<Computed>; 3]> {
        let device = dy.device().as_cuda_device()?;
        let delta = Buffer::new(device, (heads.b, heads.n, heads.l), DType::F32)?;
        let [q_tracked, k_tracked, v_tracked] = inputs.map(Tensor::track_op);
        let [q, k, v] = inputs.map(operand);
        let (q, k, v, y, dy) = (q?, k?, v?, operand(y)?, operand(dy)?);
        let (q, k, v, y, dy) = (View::of(&q)?, View::of(&k)?, View::of(&v)?, View::of(&y)?, View::of(&dy)?);
        let log_sum_exp = View::of(log_sum_exp)?;
        deltas(device, heads, &y, &dy, &delta)?;
        let read = [q.arg(), k.arg(), v.arg(), dy.arg(), log_sum_exp.arg(), delta.arg()];
        let mut grads = [None, None, None];
        if q_tracked {
            let dq = Buffer::new(device, (heads.b, heads.l, heads.d), DType::BF16)?;
            let pointers = [&read[..], &[dq.arg()]].concat();
            self.launch(device, "backward_queries", self.backward_queries, heads, heads.l, &pointers)?;
            grads[0] = Some(dq.computed());
        }
        if k_tracked || v_tracked {
            let dk = Buffer::new(device, (heads.b, heads.s, heads.d), DType::BF16)?;
            let dv = Buffer::new(device, (heads.b, heads.s, heads.d), DType::BF16)?;
            let pointers = [&read[..], &[dk.arg(), dv.arg()]].concat();
            let (name, kernel) = match self.backward_few_keys {
                Some(kernel) if heads.s <= FEW_KEYS => ("backward_few_keys", kernel),
                _ => ("backward_keys", self.backward_keys),
            };
            self.launch(device, name, kernel, heads, heads.s, &pointers)?;
            (grads[1], grads[2]) = (Some(dk.computed()), Some(dv.computed()));
        }
        Ok(grads)
    }

    /// Launches the kernel `name` of this width over `n_rows` of each head.
    fn launch(
        &self,
        device: &CudaDevice,
        name: &str,
        kernel: Kernel,
        heads: &Heads,
        n_rows: usize,
        pointers: &[Arg],
    ) -> Result<()> {
        let name = format!("attention_{name}_{}", self.width);
        let Kernel { rows, threads, shared_bytes } = kernel;
        let grid = Grid { blocks: heads.b * heads.n * n_rows.div_ceil(rows), threads, shared_bytes };
        let args = [pointers, &[Arg::Attention(Sizes::of(heads)?)]].concat();
        launch(device, ("attention", DType::BF16, &name), grid, &args)
    }
}

/// The sum of each row of `dy * y`, `[B, N, L]`.
fn deltas(device: &CudaDevice, heads: &Heads, y: &View, dy: &View, delta: &Buffer) -> Result<()> {
    let grid = Grid { blocks: delta.len().div_ceil(32), threads: 256, shared_bytes: 0 };
    let args = [y.arg(), dy.arg(), delta.arg(), Arg::Attention(Sizes::of(heads)?), int(heads.width())];
    launch(device, ("attention", DType::BF16, "attention_delta"), grid, &args)
}

/// A contiguous tensor as the kernels read it: bf16, from a multiple of 16 bytes. A copy where it begins elsewhere.
fn operand(x: &Tensor) -> Result<Tensor> {
    if x.dtype() != DType::BF16 {
        bail!("attention: got {:?} beside bf16", x.dtype());
    }
    if View::of(x)?.address.is_multiple_of(16) { Ok(x.clone()) } else { x.detach().force_contiguous() }
}

/// Where a head's row of a tensor is, in elements.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Layout {
    batch: i64,
    token: i32,
    head: i32,
}

/// `Attention` of `attention.cu`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct Sizes {
    batch: i32,
    heads: i32,
    queries: i32,
    keys: i32,
    causal: i32,
    scale: f32,
    q: Layout,
    k: Layout,
    v: Layout,
    out: Layout,
    d_out: Layout,
    d_q: Layout,
    d_k: Layout,
    d_v: Layout,
}

const _: () = assert!(size_of::<Sizes>() == 24 + 8 * 16, "no padding");

// SAFETY: the fields are the kernels' in their order and of their sizes, and there is no padding.
unsafe impl DeviceRepr for Sizes {}

impl Sizes {
    /// Of contiguous tensors.
    fn of(heads: &Heads) -> Result<Self> {
        let sizes = [heads.b, heads.n, heads.l, heads.s, heads.d];
        // Rows past the last one are numbered too.
        if sizes.iter().any(|&size| size > 1 << 30) {
            bail!("attention: sizes {sizes:?} are too large for its kernels");
        }
        let [batch, n, queries, keys, d] = sizes.map(|size| size as i32);
        let rows = |tokens: i32| Layout {
            batch: i64::from(tokens) * i64::from(d),
            token: d,
            head: heads.width() as i32,
        };
        let (of_queries, of_keys) = (rows(queries), rows(keys));
        Ok(Self {
            batch,
            heads: n,
            queries,
            keys,
            causal: i32::from(heads.causal),
            scale: heads.scale(),
            q: of_queries,
            k: of_keys,
            v: of_keys,
            out: of_queries,
            d_out: of_queries,
            d_q: of_queries,
            d_k: of_keys,
            d_v: of_keys,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::attention::FUSED_WIDTHS;

    /// Bytes of a tile of bf16, whose rows are an odd number of 16 bytes apart.
    fn tile(rows: usize, width: usize) -> usize {
        2 * rows * if width / 8 % 2 == 1 { width } else { width + 8 }
    }

    /// What a line such as `FORWARD(40, 1, 2, 4, 64)` of `attention.cu` makes, by the formulas in its comments.
    fn kernel_of(line: &str) -> Option<(usize, String, Kernel)> {
        let (shape, arguments) = line.split_once('(')?;
        if !shape.chars().all(|c| c.is_ascii_uppercase() || c == '_') {
            return None;
        }
        let arguments: Vec<&str> = arguments.split([',', ')']).map(str::trim).collect();
        let width = arguments[0].parse().ok()?;
        let numbers: Vec<usize> =
            arguments[1..].iter().filter_map(|argument| argument.parse().ok()).collect();
        let f32s = |rows: usize, columns: usize, parts: usize| {
            if parts > 1 { 4 * rows * columns * parts } else { 0 }
        };
        let of = |rows, warps, shared_bytes| Kernel { rows, threads: 32 * warps, shared_bytes };
        let (name, kernel) = match (shape, &numbers[..]) {
            ("FORWARD", &[parts, m, warps, columns]) => {
                let rows = 16 * m * warps;
                let shared_bytes = 4 * tile(columns, width) + f32s(rows, columns, parts);
                ("forward".to_owned(), of(rows, warps * parts, shared_bytes))
            }
            ("BACKWARD_QUERIES", &[parts, m, warps, columns, step]) => {
                let rows = 16 * m * warps;
                let shared_bytes = 4 * tile(columns, width) + 2 * f32s(rows, step, parts);
                ("backward_queries".to_owned(), of(rows, warps * parts, shared_bytes))
            }
            ("BACKWARD_KEYS", &[parts, splits, m, warps, columns, step, ..]) => {
                let rows = 16 * m * warps;
                let kept = if line.contains("InShared") { 2 * tile(rows, width) } else { 0 };
                let shared_bytes =
                    4 * tile(columns, width) + 4 * 4 * columns + 2 * f32s(rows, step, parts) + kept;
                (format!("backward_{}", arguments[1]), of(rows, warps * parts * splits, shared_bytes))
            }
            _ => panic!("{line}: not known"),
        };
        Some((width, name, kernel))
    }

    #[test]
    fn the_table_is_that_of_the_kernels() {
        let mut wanted: Vec<_> = include_str!("attention.cu").lines().filter_map(kernel_of).collect();
        let mut ours = Vec::new();
        for fused in &FUSED {
            let mut add = |name: &str, kernel: &Kernel| ours.push((fused.width, name.to_owned(), *kernel));
            add("forward", &fused.forward);
            add("backward_queries", &fused.backward_queries);
            add("backward_keys", &fused.backward_keys);
            fused.backward_few_keys.iter().for_each(|kernel| add("backward_few_keys", kernel));
        }
        let by_name = |(width, name, _): &(usize, String, Kernel)| (*width, name.clone());
        wanted.sort_by_key(by_name);
        ours.sort_by_key(by_name);
        assert_eq!(ours, wanted);
    }

    #[test]
    fn bf16_of_these_widths_alone_is_fused() {
        let heads = |width: usize, s: usize| Heads { b: 1, l: 5, s, d: 2 * width, n: 2, causal: false };
        assert_eq!(FUSED.each_ref().map(|fused| fused.width), FUSED_WIDTHS);
        for width in FUSED_WIDTHS {
            assert!(Fused::of(&heads(width, 1), DType::BF16).is_some_and(|fused| fused.width == width));
            assert!(Fused::of(&heads(width, 1), DType::F32).is_none());
            assert!(Fused::of(&heads(width, 0), DType::BF16).is_none(), "there is nothing to add up");
            assert!(Fused::of(&heads(width + 8, 1), DType::BF16).is_none());
        }
    }
}
