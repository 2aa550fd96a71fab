//! Launches `embedding.cu`: rows of a table, and the sums of their gradients.

use super::{Arg, Buffer, Computed, CudaDevice, DType, DevicePtr, Grid, Result, Tensor, View, int, launch};

pub(in crate::ops) fn embedding(ids: &[u32], table: &Tensor, shape: Vec<usize>) -> Result<Computed> {
    let (device, cols) = (table.device().as_cuda_device()?, table.dim(1)?);
    let table = View::of(table)?;
    let y = Buffer::new(device, shape, table.dtype)?;
    with_ids(device, ids, |ids_arg| {
        let args = [table.arg(), ids_arg, y.arg(), int(cols)];
        launch(device, ("embedding", table.dtype, "embedding"), Grid::rows(ids.len(), cols), &args)
    })?;
    Ok(y.computed())
}

pub(in crate::ops) fn embedding_backward(
    ids: &[u32],
    dy: &Tensor,
    n_rows: usize,
    cols: usize,
) -> Result<Computed> {
    let (device, dy) = (dy.device().as_cuda_device()?, View::of(dy)?);
    let table = Buffer::zeros(device, (n_rows, cols), DType::F32)?;
    with_ids(device, ids, |ids_arg| {
        let args = [dy.arg(), ids_arg, table.arg(), int(ids.len()), int(cols)];
        launch(device, ("embedding", dy.dtype, "embedding_bwd"), Grid::rows(ids.len(), cols), &args)
    })?;
    Ok(table.computed())
}

/// Takes the ids to the GPU for one launch. No ids, no launch.
fn with_ids(device: &CudaDevice, ids: &[u32], use_them: impl FnOnce(Arg) -> Result<()>) -> Result<()> {
    if ids.is_empty() {
        return Ok(());
    }
    let ids = device.clone_htod(ids)?;
    let stream = device.cuda_stream();
    let address = ids.device_ptr(&stream).0;
    use_them(Arg::Address(address))
}
