//! Embedding: rows of a table by their index.

use candle_core::{Device, Result, Tensor, bail};

use super::cpu::{View, zeros};
use super::custom_op::{Computed, custom_op};
use crate::dry_run::{Cost, DryTensor, Meter, gradient_bytes};
use crate::param::Param;

/// `y[i] = table[ids[i]]`.
///
/// * `ids`: numbers of rows, any shape `dims` with as many elements
/// * `table` `[V, D]`
///
/// Gives `[dims.., D]`. Differentiable in `table`; a row picked several times gets the sum.
pub fn embedding(ids: &[u32], dims: &[usize], table: &Param) -> Result<Tensor> {
    let value = table.value();
    let (n_rows, d) = value.dims2()?;
    if ids.len() != dims.iter().product::<usize>() {
        bail!("{}: {} ids do not fill {dims:?}", table.name(), ids.len());
    }
    if let Some(id) = ids.iter().find(|&&id| id as usize >= n_rows) {
        bail!("{}: id {id} is outside the {n_rows} rows", table.name());
    }
    let shape = [dims, &[d]].concat();
    let computed = match value.device() {
        Device::Cpu => {
            let rows = View::of(&value, "embedding")?;
            let picked = ids.iter().flat_map(|&id| &rows[id as usize * d..][..d]).copied().collect();
            Computed::cpu(picked, shape)
        }
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => super::cuda::embedding(ids, &value, shape)?,
        other => bail!("embedding: no kernel for {other:?}"),
    };
    let (ids, table) = (ids.to_vec(), table.clone());
    let tag = table.tag().clone();
    custom_op("embedding", &[&tag], computed, move |dy| {
        if table.is_trainable() {
            table.add_grad(match dy.device() {
                Device::Cpu => backward(&ids, dy, n_rows, d)?.detached(),
                #[cfg(feature = "cuda")]
                Device::Cuda(_) => super::cuda::embedding_backward(&ids, dy, n_rows, d)?.detached(),
                other => bail!("embedding: no kernel for {other:?}"),
            })?;
        }
        Ok([None, None, None])
    })
}

/// [`embedding()`] in a dry run, of `dims` rows. The gradient of a table is a whole table.
pub(crate) fn dry(meter: &Meter, dims: &[usize], table: &Param) -> DryTensor {
    let shape = [dims, &table.dims()[1..]].concat();
    DryTensor::custom_leaf(meter, &shape, Cost { gradients: gradient_bytes([table]), ..Cost::default() })
}

fn backward(ids: &[u32], dy: &Tensor, n_rows: usize, d: usize) -> Result<Computed> {
    let dy = View::of(dy, "embedding")?;
    let mut table = zeros(n_rows * d);
    for (&id, dy) in ids.iter().zip(dy.chunks_exact(d)) {
        let row = &mut table[id as usize * d..][..d];
        row.iter_mut().zip(dy).for_each(|(sum, dy)| *sum += dy);
    }
    Ok(Computed::cpu(table, (n_rows, d)))
}
