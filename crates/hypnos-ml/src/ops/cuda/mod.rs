//! The CUDA side of the operations: our kernels, compiled by `build.rs`, and the functions that launch them.
//!
//! A kernel file is compiled once for each storage type, so a kernel is named by its file, the dtype of the tensors it
//! works on, and its name. Tensors are f32 or bf16; sums and everything that a sum passes through are f32, and so are
//! vectors of parameters for our kernels and all gradients of parameters. Matrix products are cuBLAS's, but for those in
//! the fused attention, and cuBLASLt's where it adds a bias or a residual; convolutions are cuDNN's where the program was
//! built with it. A bias that cuBLASLt or cuDNN adds is of their factors' dtype. Nothing here is random or depends on the
//! order in which blocks finish.
//!
//! A device has one stream ([`prepare`]), so what is launched later sees what was launched before, and memory freed
//! while a kernel still reads it is given away only after that kernel.
#![allow(unsafe_code)] // kernels and driver calls know nothing of Rust's rules; each use says why it is sound

use std::collections::HashSet;
use std::sync::{LazyLock, PoisonError, RwLock};

use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, DevicePtr, LaunchConfig, PushKernelArg, result, sys,
};
use candle_core::cuda_backend::{CudaDevice, CudaStorageSlice, DeviceId, WrapErr};
use candle_core::{CudaStorage, DType, Result, Shape, Storage, StorageRef, Tensor, bail};

use super::custom_op::Computed;

mod adamw;
mod attention;
mod concat;
mod conv2d;
#[cfg(feature = "cudnn")]
mod cudnn;
mod elementwise;
mod embedding;
mod fused_attention;
mod linear;
mod matmul;
mod norm;
mod projection;
mod reduce;
mod softmax;
mod spatial;

pub(super) use adamw::{Moments, Slot, adamw, square_sum};
pub(super) use attention::{attention, attention_backward};
pub(super) use concat::{concat, concat_backward};
pub(super) use conv2d::{conv2d, conv2d_backward};
pub(super) use elementwise::{activation, activation_backward, geglu, geglu_backward};
pub(super) use embedding::{embedding, embedding_backward};
pub(super) use linear::{linear, linear_backward, linear_of, linears};
pub(super) use norm::{group_norm, group_norm_backward, layer_norm, layer_norm_backward};
pub(super) use projection::{
    picture_to_tokens, picture_to_tokens_backward, tokens_to_picture, tokens_to_picture_backward,
};
pub(super) use softmax::{softmax, softmax_backward};
pub(super) use spatial::{depthwise, depthwise_backward, upsample, upsample_backward};

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// CUDA's versions, as [`CUDA_VERSION`], and the first NVIDIA driver of each (NVIDIA, CUDA Toolkit release notes).
const DRIVERS: [(i32, u32); 10] = [
    (12000, 525),
    (12010, 530),
    (12020, 535),
    (12030, 545),
    (12040, 550),
    (12050, 555),
    (12060, 560),
    (12080, 570),
    (12090, 575),
    (13000, 580),
];

/// Refuses, in one line, a driver for an older CUDA than this program was built with: it cannot read our kernels' PTX.
pub(crate) fn check_driver() -> std::result::Result<(), String> {
    let mut found = 0;
    // SAFETY: it writes one number.
    let answer = unsafe { sys::cuDriverGetVersion(&raw mut found) };
    answer.result().map_err(|error| format!("its driver does not say its version ({:?})", error.0))?;
    if found >= CUDA_VERSION {
        return Ok(());
    }
    let words = |version: i32| format!("CUDA {}.{}", version / 1000, version % 1000 / 10);
    let wanted = match DRIVERS.iter().find(|(version, _)| *version == CUDA_VERSION) {
        Some((_, driver)) => format!("{driver} or newer"),
        None => format!("one for {}", words(CUDA_VERSION)),
    };
    let (found, built) = (words(found), words(CUDA_VERSION));
    Err(format!(
        "the NVIDIA driver is too old: it is for {found}, this program was built with {built}; wanted {wanted}"
    ))
}

/// The kernel `name` of `file`.cu for tensors of `dtype`, loaded on first use and kept by the device.
fn kernel(device: &CudaDevice, file: &str, dtype: DType, name: &str) -> Result<CudaFunction> {
    let module = format!("{file}_{}", dtype.as_str());
    match PTX.iter().find(|(known, _)| *known == module) {
        Some((_, ptx)) => Ok(device.get_or_load_custom_func(name, &module, ptx)?.into_cuda_function()),
        None => bail!("{name}: no CUDA kernel for {dtype:?}; wanted f32 or bf16"),
    }
}

/// Makes a new device ready: checks that its driver takes our kernels, and lets it keep freed memory.
///
/// By default the driver hands freed memory back at every synchronisation, and the next step asks for it again. The
/// device must have a stream of its own (`Device::new_cuda_with_stream`) and no tensors yet.
pub(crate) fn prepare(device: &CudaDevice) -> Result<()> {
    kernel(device, "embedding", DType::F32, "embedding")?;
    // SAFETY: everything on this device runs on its one stream, in order, so no event has to keep uses apart.
    unsafe { device.disable_event_tracking() };
    matmul::prepare(device)?;
    let gpu = device.cuda_stream().context().cu_device();
    let mut all = u64::MAX;
    // SAFETY: the context keeps `gpu` valid, and this attribute is a u64.
    unsafe {
        let pool = result::device::get_default_mem_pool(gpu).w()?;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        result::mem_pool::set_attribute(pool, attribute, std::ptr::from_mut(&mut all).cast()).w()
    }
}

/// The devices that round the factors of f32 products to TF32.
static TF32: LazyLock<RwLock<HashSet<DeviceId>>> = LazyLock::new(RwLock::default);

/// Has the device round the factors of f32 products and convolutions to TF32: before it computes anything.
pub(crate) fn allow_tf32(device: &CudaDevice) {
    TF32.write().unwrap_or_else(PoisonError::into_inner).insert(device.id());
}

/// Whether [`allow_tf32`] was called for the device.
fn allows_tf32(device: &CudaDevice) -> bool {
    TF32.read().unwrap_or_else(PoisonError::into_inner).contains(&device.id())
}

/// Its compute capability, major and minor.
pub(crate) fn compute_capability(device: &CudaDevice) -> Result<(i32, i32)> {
    device.cuda_stream().context().compute_capability().w()
}

/// Bytes that are free on the device, by its driver; what [`prepare`] has it keep is not among them.
pub(crate) fn free_bytes(device: &CudaDevice) -> Result<u64> {
    device.cuda_stream().context().bind_to_thread().w()?;
    Ok(result::mem_get_info().w()?.0 as u64)
}

/// Bytes of the device's memory.
pub(crate) fn total_bytes(device: &CudaDevice) -> Result<u64> {
    device.cuda_stream().context().bind_to_thread().w()?;
    Ok(result::mem_get_info().w()?.1 as u64)
}

/// Hands back what was freed and kept, once all that was launched has run.
pub(crate) fn release(device: &CudaDevice) -> Result<()> {
    device.synchronize()?;
    let gpu = device.cuda_stream().context().cu_device();
    // SAFETY: the context keeps `gpu` valid, and what is in use stays.
    unsafe {
        let pool = result::device::get_default_mem_pool(gpu).w()?;
        result::mem_pool::trim_to(pool, 0).w()
    }
}

/// A contiguous tensor on a GPU and where it lies. As long as it lives the tensor's memory does.
struct View<'a> {
    _storage: StorageRef<'a>,
    address: u64,
    dtype: DType,
    len: usize,
}

impl<'a> View<'a> {
    /// Errors if the tensor is not contiguous, not on a GPU, or of a dtype that no kernel has.
    fn of(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("wanted a contiguous tensor on the GPU, got strides {:?}", layout.stride());
        };
        let Storage::Cuda(cuda) = &*storage else { bail!("wanted a tensor on the GPU") };
        let dtype = tensor.dtype();
        let address = address(cuda)? + (start * dtype.size_in_bytes()) as u64;
        Ok(Self { _storage: storage, address, dtype, len: end - start })
    }

    /// A matrix whose rows are contiguous, and how many elements lie from one row to the next.
    fn of_rows(tensor: &'a Tensor) -> Result<(Self, usize)> {
        let (storage, layout) = tensor.storage_and_layout();
        let (&[rows, columns], &[pitch, 1]) = (layout.dims(), layout.stride()) else {
            bail!("wanted rows on the GPU, got {:?} with strides {:?}", layout.dims(), layout.stride());
        };
        let Storage::Cuda(cuda) = &*storage else { bail!("wanted a tensor on the GPU") };
        let dtype = tensor.dtype();
        let address = address(cuda)? + (layout.start_offset() * dtype.size_in_bytes()) as u64;
        Ok((Self { _storage: storage, address, dtype, len: rows * columns }, pitch))
    }

    fn arg(&self) -> Arg {
        Arg::Address(self.address)
    }
}

/// Memory for a result in row-major order. What is launched on it must write every element.
struct Buffer {
    storage: CudaStorage,
    address: u64,
    shape: Shape,
    dtype: DType,
}

impl Buffer {
    fn new(device: &CudaDevice, shape: impl Into<Shape>, dtype: DType) -> Result<Self> {
        let shape = shape.into();
        // The driver refuses to allocate nothing.
        let room = if shape.elem_count() == 0 { Shape::from(1) } else { shape.clone() };
        // SAFETY: the bits are plain numbers; who makes a buffer launches what fills it.
        Self::of(unsafe { device.alloc_uninit(&room, dtype)? }, shape, dtype)
    }

    fn zeros(device: &CudaDevice, shape: impl Into<Shape>, dtype: DType) -> Result<Self> {
        let shape = shape.into();
        Self::of(device.zeros_impl(&shape, dtype)?, shape, dtype)
    }

    fn of(storage: CudaStorage, shape: Shape, dtype: DType) -> Result<Self> {
        let address = address(&storage)?;
        Ok(Self { storage, address, shape, dtype })
    }

    fn len(&self) -> usize {
        self.shape.elem_count()
    }

    fn arg(&self) -> Arg {
        Arg::Address(self.address)
    }

    fn computed(self) -> Computed {
        Computed { storage: Storage::Cuda(self.storage), shape: self.shape }
    }

    fn tensor(self) -> Tensor {
        self.computed().detached()
    }
}

/// Where a storage begins.
fn address(storage: &CudaStorage) -> Result<u64> {
    let stream = storage.device.cuda_stream();
    // The guard beside the address would order several streams; there is one.
    match &storage.slice {
        CudaStorageSlice::F32(values) => Ok(values.device_ptr(&stream).0),
        CudaStorageSlice::BF16(values) => Ok(values.device_ptr(&stream).0),
        _ => bail!("wanted f32 or bf16 on the GPU"),
    }
}

/// An argument of a kernel, of the type that its head names.
#[derive(Clone, Copy)]
enum Arg {
    Address(u64),
    Int(i32),
    Long(i64),
    Float(f32),
    Window(spatial::Window),
    Attention(fused_attention::Sizes),
    /// A count that no `int` holds.
    TooLarge(usize),
}

/// A tensor that may be missing, which a kernel gets as null.
fn optional(view: Option<&View>) -> Arg {
    view.map_or(Arg::Address(0), View::arg)
}

/// An `int`.
fn int(n: usize) -> Arg {
    i32::try_from(n).map_or(Arg::TooLarge(n), Arg::Int)
}

/// A `long long`.
fn long(n: usize) -> Arg {
    i64::try_from(n).map_or(Arg::TooLarge(n), Arg::Long)
}

/// An `int` that is 0 or 1.
fn flag(yes: bool) -> Arg {
    Arg::Int(i32::from(yes))
}

/// Blocks, threads in each, and the shared memory that each gets beside what its kernel declares.
#[derive(Clone, Copy)]
struct Grid {
    blocks: usize,
    threads: usize,
    shared_bytes: usize,
}

/// The shared memory that a launch may ask for unless its kernel is allowed more.
const USUAL_SHARED_BYTES: usize = 48 << 10;

/// Enough blocks to fill any GPU several times over; a kernel for any grid takes more elements per thread instead.
const MOST_BLOCKS: usize = 8192;

impl Grid {
    /// For a kernel that takes any grid, over `n` elements.
    fn any(n: usize) -> Self {
        Self { blocks: n.div_ceil(256).min(MOST_BLOCKS), threads: 256, shared_bytes: 0 }
    }

    /// For a kernel with one block per row of `cols` elements, four of which a thread reads at once.
    fn rows(rows: usize, cols: usize) -> Self {
        let threads = cols.div_ceil(4).next_multiple_of(32).clamp(32, 1024);
        Self { blocks: rows, threads, shared_bytes: 0 }
    }
}

/// Launches the kernel `name` of `file`.cu. An empty grid launches nothing.
///
/// The arguments must be those of the kernel's head: that is what every caller here answers for.
fn launch(
    device: &CudaDevice,
    (file, dtype, name): (&str, DType, &str),
    grid: Grid,
    args: &[Arg],
) -> Result<()> {
    if grid.blocks == 0 {
        return Ok(());
    }
    let Ok(blocks) = i32::try_from(grid.blocks) else { bail!("{name}: {} blocks are too many", grid.blocks) };
    let function = kernel(device, file, dtype, name)?;
    let stream = device.cuda_stream();
    if grid.shared_bytes > USUAL_SHARED_BYTES {
        // Once for each function would do, but few launches need so much.
        stream.context().bind_to_thread().w()?;
        let most = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(most, grid.shared_bytes as i32).w()?;
    }
    let mut builder = stream.launch_builder(&function);
    for arg in args {
        match arg {
            Arg::Address(address) => builder.arg(address),
            Arg::Int(n) => builder.arg(n),
            Arg::Long(n) => builder.arg(n),
            Arg::Float(x) => builder.arg(x),
            Arg::Window(window) => builder.arg(window),
            Arg::Attention(sizes) => builder.arg(sizes),
            Arg::TooLarge(n) => bail!("{name}: a size of {n} is too large for its kernel"),
        };
    }
    let (grid_dim, block_dim) = ((blocks as u32, 1, 1), (grid.threads as u32, 1, 1));
    let config = LaunchConfig { grid_dim, block_dim, shared_mem_bytes: grid.shared_bytes as u32 };
    // SAFETY: the arguments agree with the kernel's head, and the addresses are those of views and buffers that the
    // caller holds and has checked to be as long as the kernel expects.
    unsafe { builder.launch(config) }.w()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_file_is_compiled_for_both_storages() {
        let files = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/src/ops/cuda")).unwrap();
        let files =
            files.map(|file| file.unwrap().path()).filter(|file| file.extension().is_some_and(|e| e == "cu"));
        for file in files {
            for storage in ["f32", "bf16"] {
                let module = format!("{}_{storage}", file.file_stem().unwrap().to_str().unwrap());
                let (_, ptx) =
                    PTX.iter().find(|(name, _)| *name == module).expect("a module per file and storage");
                assert!(ptx.contains(".visible .entry"), "{module} has no kernel");
            }
        }
    }
}
