//! Launches `adamw.cu`: all weights in one launch.

use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr, DeviceRepr};

use super::{Arg, CudaDevice, DType, Grid, Result, Tensor, View, bail, launch};
use crate::ops::adamw::Update;

/// First and second moment of one weight, on its device.
pub(in crate::ops) struct Moments {
    device: CudaDevice,
    m: CudaSlice<f32>,
    v: CudaSlice<f32>,
}

impl Moments {
    pub(in crate::ops) fn zeros(device: &CudaDevice, n: usize) -> Result<Self> {
        let (m, v) = (device.alloc_zeros(n)?, device.alloc_zeros(n)?);
        Ok(Self { device: device.clone(), m, v })
    }

    pub(in crate::ops) fn upload(device: &CudaDevice, m: &[f32], v: &[f32]) -> Result<Self> {
        let (m, v) = (device.clone_htod(m)?, device.clone_htod(v)?);
        Ok(Self { device: device.clone(), m, v })
    }

    pub(in crate::ops) fn download(&self) -> Result<(Vec<f32>, Vec<f32>)> {
        Ok((self.device.clone_dtoh(&self.m)?, self.device.clone_dtoh(&self.v)?))
    }
}

/// One weight of a step.
pub(in crate::ops) struct Slot<'a> {
    pub(crate) value: Tensor,
    pub(crate) grad: Tensor,
    pub(crate) moments: &'a mut Moments,
}

/// `Slot` of `adamw.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct RawSlot {
    value: u64,
    mean: u64,
    variance: u64,
    grad: u64,
    len: i64,
}

/// `Chunk` of `adamw.cu`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
struct RawChunk {
    slot: i32,
    index: i32,
}

// SAFETY: numbers in the kernel's order, without padding.
unsafe impl DeviceRepr for RawSlot {}
// SAFETY: as above.
unsafe impl DeviceRepr for RawChunk {}

/// `CHUNK` of `adamw.cu`: elements that one block works on.
const CHUNK: usize = 65536;

/// Threads of a block.
const THREADS: usize = 512;

/// What each block works on, for tensors of these lengths.
fn chunks(lens: impl Iterator<Item = usize>) -> Vec<RawChunk> {
    let of = |(slot, len): (usize, usize)| {
        (0..len.div_ceil(CHUNK)).map(move |index| RawChunk { slot: slot as i32, index: index as i32 })
    };
    lens.enumerate().flat_map(of).collect()
}

/// The tables on the device.
struct Tables {
    slots: CudaSlice<RawSlot>,
    chunks: CudaSlice<RawChunk>,
    n_chunks: usize,
}

impl Tables {
    /// `None` if there is nothing to work on.
    fn new(device: &CudaDevice, slots: &[RawSlot]) -> Result<Option<Self>> {
        let chunks = chunks(slots.iter().map(|slot| slot.len as usize));
        if chunks.is_empty() {
            return Ok(None);
        }
        let n_chunks = chunks.len();
        Ok(Some(Self { slots: device.clone_htod(slots)?, chunks: device.clone_htod(&chunks)?, n_chunks }))
    }

    fn args(&self, device: &CudaDevice) -> [Arg; 2] {
        let stream = device.cuda_stream();
        let address = self.slots.device_ptr(&stream).0;
        [Arg::Address(address), Arg::Address(self.chunks.device_ptr(&stream).0)]
    }

    fn grid(&self) -> Grid {
        Grid { blocks: self.n_chunks, threads: THREADS }
    }
}

/// The one device of all these tensors.
fn device_of<'a>(mut tensors: impl Iterator<Item = &'a Tensor>) -> Result<Option<&'a CudaDevice>> {
    let Some(first) = tensors.next() else { return Ok(None) };
    if tensors.any(|tensor| !tensor.device().same_device(first.device())) {
        bail!("AdamW: wanted all weights on one GPU");
    }
    first.device().as_cuda_device().map(Some)
}

fn wanted(tensor: &Tensor) -> Result<View<'_>> {
    let view = View::of(tensor)?;
    if view.dtype != DType::F32 {
        bail!("AdamW: wanted f32, got {:?}", view.dtype);
    }
    Ok(view)
}

/// Sum of squares over all tensors together, in f64 across chunks. Waits for the GPU.
pub(in crate::ops) fn square_sum(tensors: &[Tensor]) -> Result<f64> {
    let Some(device) = device_of(tensors.iter())? else { return Ok(0.0) };
    let views = tensors.iter().map(wanted).collect::<Result<Vec<_>>>()?;
    let slot =
        |view: &View| RawSlot { value: 0, mean: 0, variance: 0, grad: view.address, len: view.len as i64 };
    let slots: Vec<_> = views.iter().map(slot).collect();
    let Some(tables) = Tables::new(device, &slots)? else { return Ok(0.0) };
    let sums = device.alloc_zeros::<f32>(tables.n_chunks)?;
    let stream = device.cuda_stream();
    let to = Arg::Address(sums.device_ptr(&stream).0);
    let args = [&tables.args(device)[..], &[to]].concat();
    launch(device, ("adamw", DType::F32, "sum_squares"), tables.grid(), &args)?;
    Ok(device.clone_dtoh(&sums)?.into_iter().map(f64::from).sum())
}

/// Updates every weight in place, and its moments.
pub(in crate::ops) fn adamw(slots: &mut [Slot], update: &Update) -> Result<()> {
    let Some(device) = device_of(slots.iter().map(|slot| &slot.value))? else { return Ok(()) };
    device_of(slots.iter().flat_map(|slot| [&slot.value, &slot.grad]))?;
    let mut raw = Vec::new();
    // The kernel writes behind these views. That is sound because it runs on the stream, after every launch that reads
    // the old values and before every one that reads the new, and nothing in Rust refers to memory of the GPU.
    let mut held = Vec::new();
    for Slot { value, grad, moments } in &*slots {
        let (value, grad) = (wanted(value)?, wanted(grad)?);
        if value.len != grad.len || value.len != moments.m.len() || value.len != moments.v.len() {
            let (m, v) = (moments.m.len(), moments.v.len());
            bail!("AdamW: {} weights, {} gradients, {m} and {v} moments", value.len, grad.len);
        }
        let stream = device.cuda_stream();
        let (mean, variance) = (moments.m.device_ptr(&stream).0, moments.v.device_ptr(&stream).0);
        let (len, address) = (value.len as i64, value.address);
        raw.push(RawSlot { value: address, mean, variance, grad: grad.address, len });
        held.push((value, grad));
    }
    let Some(tables) = Tables::new(device, &raw)? else { return Ok(()) };
    let Update { clip, beta1, beta2, rate, correction, eps, keep } = *update;
    let numbers = [clip, beta1, beta2, rate, correction, eps, keep].map(Arg::Float);
    let args = [&tables.args(device)[..], &numbers].concat();
    launch(device, ("adamw", DType::F32, "adamw"), tables.grid(), &args)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_every_tensor() {
        let chunk = |slot, index| RawChunk { slot, index };
        let wanted = [chunk(0, 0), chunk(2, 0), chunk(2, 1), chunk(3, 0)];
        assert_eq!(chunks([1, 0, CHUNK + 1, CHUNK].into_iter()), wanted);
    }

    #[test]
    fn the_kernel_s_chunk_is_ours() {
        assert!(include_str!("adamw.cu").contains(&format!("CHUNK = {CHUNK} ")));
    }
}
