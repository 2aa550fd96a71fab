//! Launches `reduce.cu`: sums for the gradients of vectors, in an order that never changes.

use super::{Buffer, CudaDevice, DType, Grid, Result, Tensor, View, int, launch};

/// Rows that one block sums: few enough to fill a GPU, many enough that the second stage is short.
const ROWS_PER_PART: usize = 256;

/// How `rows` of `cols` columns are shared out among blocks: the parts, and the grid over parts and columns.
pub(super) fn parts(rows: usize, cols: usize) -> (usize, Grid) {
    let n = rows.div_ceil(ROWS_PER_PART);
    (n, Grid { blocks: n * cols.div_ceil(32), threads: 256, shared_bytes: 0 })
}

/// The `rows_per_part` that goes with [`parts`].
pub(super) fn rows_per_part() -> super::Arg {
    int(ROWS_PER_PART)
}

/// Sums `[rows, cols]` over the rows; f32.
pub(super) fn column_sums(device: &CudaDevice, x: &View, cols: usize) -> Result<Tensor> {
    let rows = x.len / cols.max(1);
    let (n, grid) = parts(rows, cols);
    let sums = Buffer::new(device, (1, n, cols), DType::F32)?;
    let args = [x.arg(), sums.arg(), int(rows), int(cols), rows_per_part()];
    launch(device, ("reduce", x.dtype, "column_sum"), grid, &args)?;
    join(device, sums)?.get(0)
}

/// Sums `[B, channels, inner]` over images and places; f32 `[channels]`.
pub(super) fn channel_sums(device: &CudaDevice, x: &View, channels: usize, inner: usize) -> Result<Tensor> {
    let images = x.len / (channels * inner).max(1);
    let sums = Buffer::new(device, channels, DType::F32)?;
    let args = [x.arg(), sums.arg(), int(images), int(channels), int(inner)];
    launch(device, ("reduce", x.dtype, "channel_sum"), Grid::rows(channels, images * inner), &args)?;
    Ok(sums.tensor())
}

/// The sum of each run of `inner` elements; f32.
pub(super) fn plane_sums(device: &CudaDevice, x: &View, inner: usize) -> Result<Buffer> {
    let planes = x.len / inner.max(1);
    let sums = Buffer::new(device, planes, DType::F32)?;
    let args = [x.arg(), sums.arg(), int(inner)];
    launch(device, ("reduce", x.dtype, "plane_sum"), Grid::rows(planes, inner), &args)?;
    Ok(sums)
}

/// Sums stacks of parts `[stacks, n, cols]`, f32, over the parts: `[stacks, cols]`.
pub(super) fn join(device: &CudaDevice, parts: Buffer) -> Result<Tensor> {
    let (stacks, n, cols) = parts.shape.dims3()?;
    if n == 1 {
        return parts.tensor().squeeze(1);
    }
    let out = Buffer::new(device, (stacks, cols), DType::F32)?;
    let args = [parts.arg(), out.arg(), int(stacks), int(n), int(cols)];
    launch(device, ("reduce", DType::F32, "sum_parts"), Grid::any(stacks * cols), &args)?;
    Ok(out.tensor())
}
