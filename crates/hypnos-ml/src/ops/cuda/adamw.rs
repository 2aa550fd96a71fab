//! Launches `adamw.cu`: all weights in one launch.

use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr, DeviceRepr};

use super::{Arg, CudaDevice, DType, Grid, Result, Tensor, View, bail, launch};
use crate::ops::adamw::Update;
use crate::ops::blockwise::{Blocks, SIGNED, UNSIGNED, Values};

/// First and second moment of one weight, on its device.
pub(in crate::ops) struct Moments {
    device: CudaDevice,
    kept: Kept,
}

enum Kept {
    F32 { m: CudaSlice<f32>, v: CudaSlice<f32> },
    Bits8 { m: OnDevice, v: OnDevice },
}

/// [`Blocks`] on a device.
struct OnDevice {
    codes: CudaSlice<u8>,
    scales: CudaSlice<f32>,
    values: &'static Values,
}

impl OnDevice {
    fn upload(device: &CudaDevice, blocks: &Blocks) -> Result<Self> {
        let (codes, scales) = (device.clone_htod(&blocks.codes)?, device.clone_htod(&blocks.scales)?);
        Ok(Self { codes, scales, values: blocks.values })
    }

    fn download(&self, device: &CudaDevice) -> Result<Vec<f32>> {
        let (codes, scales) = (device.clone_dtoh(&self.codes)?, device.clone_dtoh(&self.scales)?);
        Ok(Blocks { codes, scales, values: self.values }.to_f32())
    }
}

impl Moments {
    pub(in crate::ops) fn zeros(device: &CudaDevice, n: usize, in_8_bits: bool) -> Result<Self> {
        let kept = if in_8_bits {
            let zeros = |values| OnDevice::upload(device, &Blocks::zeros(n, values));
            Kept::Bits8 { m: zeros(&SIGNED)?, v: zeros(&UNSIGNED)? }
        } else {
            Kept::F32 { m: device.alloc_zeros(n)?, v: device.alloc_zeros(n)? }
        };
        Ok(Self { device: device.clone(), kept })
    }

    pub(in crate::ops) fn upload(device: &CudaDevice, m: &[f32], v: &[f32], in_8_bits: bool) -> Result<Self> {
        let kept = if in_8_bits {
            let blocks = |numbers: &[f32], values| OnDevice::upload(device, &Blocks::of(numbers, values));
            Kept::Bits8 { m: blocks(m, &SIGNED)?, v: blocks(v, &UNSIGNED)? }
        } else {
            Kept::F32 { m: device.clone_htod(m)?, v: device.clone_htod(v)? }
        };
        Ok(Self { device: device.clone(), kept })
    }

    pub(in crate::ops) fn download(&self) -> Result<(Vec<f32>, Vec<f32>)> {
        match &self.kept {
            Kept::F32 { m, v } => Ok((self.device.clone_dtoh(m)?, self.device.clone_dtoh(v)?)),
            Kept::Bits8 { m, v } => Ok((m.download(&self.device)?, v.download(&self.device)?)),
        }
    }

    /// How many elements the weight has.
    fn len(&self) -> usize {
        match &self.kept {
            Kept::F32 { m, .. } => m.len(),
            Kept::Bits8 { m, .. } => m.codes.len(),
        }
    }
}

/// One weight of a step.
pub(in crate::ops) struct Slot<'a> {
    pub(crate) value: Tensor,
    /// Its copy in bf16, if it has one, which is updated as well.
    pub(crate) narrow: Option<Tensor>,
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
    narrow: u64,
    len: i64,
}

/// `Slot8` of `adamw.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct RawSlot8 {
    value: u64,
    mean: u64,
    variance: u64,
    mean_scales: u64,
    variance_scales: u64,
    grad: u64,
    narrow: u64,
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
unsafe impl DeviceRepr for RawSlot8 {}
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
struct Tables<S> {
    slots: CudaSlice<S>,
    chunks: CudaSlice<RawChunk>,
    n_chunks: usize,
}

impl<S: DeviceRepr + 'static> Tables<S> {
    /// Of slots of these lengths; `None` if there is nothing to work on.
    fn new(device: &CudaDevice, slots: &[S], lens: impl Iterator<Item = usize>) -> Result<Option<Self>> {
        let chunks = chunks(lens);
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
        Grid { blocks: self.n_chunks, threads: THREADS, shared_bytes: 0 }
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
    let slot = |view: &View| RawSlot {
        value: 0,
        mean: 0,
        variance: 0,
        grad: view.address,
        narrow: 0,
        len: view.len as i64,
    };
    let slots: Vec<_> = views.iter().map(slot).collect();
    let lens = views.iter().map(|view| view.len);
    let Some(tables) = Tables::new(device, &slots, lens)? else { return Ok(0.0) };
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
    let (mut in_f32, mut in_8_bits) = (Vec::new(), Vec::new());
    // The kernels write behind these views. That is sound because they run on the stream, after every launch that reads
    // the old values and before every one that reads the new, and nothing in Rust refers to memory of the GPU.
    let mut held = Vec::new();
    for Slot { value, narrow, grad, moments } in &*slots {
        let (value, grad) = (wanted(value)?, wanted(grad)?);
        if value.len != grad.len || value.len != moments.len() {
            bail!("AdamW: {} weights, {} gradients, {} moments", value.len, grad.len, moments.len());
        }
        let copy = narrow.as_ref().map(View::of).transpose()?;
        if let Some(copy) = copy.as_ref().filter(|copy| copy.dtype != DType::BF16 || copy.len != value.len) {
            bail!(
                "AdamW: wanted a copy of {} weights in bf16, got {} in {:?}",
                value.len,
                copy.len,
                copy.dtype
            );
        }
        let narrow = copy.as_ref().map_or(0, |copy| copy.address);
        let stream = device.cuda_stream();
        let floats = |slice: &CudaSlice<f32>| slice.device_ptr(&stream).0;
        let (len, address, gradient) = (value.len as i64, value.address, grad.address);
        match &moments.kept {
            Kept::F32 { m, v } => {
                let (mean, variance) = (floats(m), floats(v));
                in_f32.push(RawSlot { value: address, mean, variance, grad: gradient, narrow, len });
            }
            Kept::Bits8 { m, v } => in_8_bits.push(RawSlot8 {
                value: address,
                mean: m.codes.device_ptr(&stream).0,
                variance: v.codes.device_ptr(&stream).0,
                mean_scales: floats(&m.scales),
                variance_scales: floats(&v.scales),
                grad: gradient,
                narrow,
                len,
            }),
        }
        held.push((value, grad, copy));
    }
    let Update { clip, beta1, beta2, rate, correction, eps, keep } = *update;
    let numbers = [clip, beta1, beta2, rate, correction, eps, keep].map(Arg::Float);
    if let Some(tables) = Tables::new(device, &in_f32, in_f32.iter().map(|slot| slot.len as usize))? {
        let args = [&tables.args(device)[..], &numbers].concat();
        launch(device, ("adamw", DType::F32, "adamw"), tables.grid(), &args)?;
    }
    if let Some(tables) = Tables::new(device, &in_8_bits, in_8_bits.iter().map(|slot| slot.len as usize))? {
        let values = device.clone_htod(&[*SIGNED, *UNSIGNED].concat())?;
        let stream = device.cuda_stream();
        let values = Arg::Address(values.device_ptr(&stream).0);
        let args = [&tables.args(device)[..], &[values], &numbers].concat();
        launch(device, ("adamw", DType::F32, "adamw_8bit"), tables.grid(), &args)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::blockwise::BLOCK;

    #[test]
    fn chunks_cover_every_tensor() {
        let chunk = |slot, index| RawChunk { slot, index };
        let wanted = [chunk(0, 0), chunk(2, 0), chunk(2, 1), chunk(3, 0)];
        assert_eq!(chunks([1, 0, CHUNK + 1, CHUNK].into_iter()), wanted);
    }

    #[test]
    fn the_kernel_s_chunk_is_ours() {
        assert!(include_str!("adamw.cu").contains(&format!("CHUNK = {CHUNK} ")));
        assert!(
            include_str!("adamw.cu").contains(&format!("BLOCK = {BLOCK}, ")) && CHUNK.is_multiple_of(BLOCK)
        );
    }
}
