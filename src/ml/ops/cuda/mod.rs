//! The CUDA side of the operations: our kernels, compiled by `build.rs`, and how they are found.
//!
//! A kernel file is compiled once for each storage type, so a kernel is named by its file, the dtype of the tensors it
//! works on, and its name. No tensor mathematics happens here, only in the kernels.
#![allow(unsafe_code)] // kernels and driver calls know nothing of Rust's rules; each use says why it is sound

use candle_core::cuda_backend::cudarc::driver::{CudaFunction, result, sys};
use candle_core::cuda_backend::{CudaDevice, WrapErr};
use candle_core::{DType, Result, bail};

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// The kernel `name` of `file`.cu for tensors of `dtype`, loaded on first use and kept by the device.
fn kernel(device: &CudaDevice, file: &str, dtype: DType, name: &str) -> Result<CudaFunction> {
    let module = format!("{file}_{}", dtype.as_str());
    match PTX.iter().find(|(known, _)| *known == module) {
        Some((_, ptx)) => Ok(device.get_or_load_custom_func(name, &module, ptx)?.into_cuda_function()),
        None => bail!("{name}: no CUDA kernel for {dtype:?}; wanted f32 or bf16"),
    }
}

/// Makes a device ready: checks that its driver takes our kernels, and lets it keep freed memory.
///
/// By default the driver hands freed memory back at every synchronisation, and the next step asks for it again.
pub(in crate::ml) fn prepare(device: &CudaDevice) -> Result<()> {
    kernel(device, "embedding", DType::F32, "embedding")?;
    let gpu = device.cuda_stream().context().cu_device();
    let mut all = u64::MAX;
    // SAFETY: the context keeps `gpu` valid, and this attribute is a u64.
    unsafe {
        let pool = result::device::get_default_mem_pool(gpu).w()?;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        result::mem_pool::set_attribute(pool, attribute, std::ptr::from_mut(&mut all).cast()).w()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_file_is_compiled_for_both_storages() {
        let files = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/src/ml/ops/cuda")).unwrap();
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
