//! Opens a device by its name, to compute in one precision. Which devices there are, and why one cannot be used, is said
//! in one line.

use candle_core::Device;

use super::plan::Place;
use super::precision::Precision;
use super::{Error, Result};

/// What a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// The machine's processor, which computes in the machine's memory.
    Cpu,
    /// A GPU with memory of its own.
    Cuda,
}

impl DeviceKind {
    /// That of an opened device.
    pub fn of(device: &Device) -> Self {
        if device.is_cuda() { Self::Cuda } else { Self::Cpu }
    }

    /// Whose memory is its own: that of one place, or of both, where they are one.
    pub fn place(self) -> Option<Place> {
        match self {
            Self::Cpu => None,
            Self::Cuda => Some(Place::Device),
        }
    }
}

/// The device called `name`: `cpu`, `cuda` (the first GPU) or `cuda:N`.
///
/// Errors with one line if the name is another, the program was built without the feature `cuda`, there is no such
/// GPU, or its driver is too old for our kernels.
pub fn open(name: &str) -> Result<Device> {
    ordinal(name)?.map_or(Ok(Device::Cpu), |ordinal| cuda(name, ordinal))
}

/// The number of the GPU called `name`, from 0, which need not be there; none for the processor. Two names with the same
/// number are one device. Errors with one line if the name is no device's.
pub fn ordinal(name: &str) -> Result<Option<usize>> {
    let is_number = |text: &&str| text.bytes().all(|byte| byte.is_ascii_digit()); // parse() takes a sign as well
    match name {
        "cpu" => Ok(None),
        "cuda" => Ok(Some(0)),
        _ => match name.strip_prefix("cuda:").filter(is_number).and_then(|text| text.parse().ok()) {
            Some(ordinal) => Ok(Some(ordinal)),
            None => Err(Error::setting("device", format!("wanted cpu, cuda or cuda:N, got {name:?}"))),
        },
    }
}

/// The device called `name`, as [`open`] gives it, and what models compute in on it: `asked`, or else what suits it, as
/// [`Precision::chosen`] says. With TF32 the device rounds factors from then on: see
/// [`Precision`]'s module.
///
/// Errors are those of [`open`] and of [`Precision::chosen`], in one line.
pub fn open_in(name: &str, asked: Option<Precision>) -> Result<(Device, Precision)> {
    let device = open(name)?;
    let precision = Precision::chosen(asked, compute_capability(&device)?)?;
    #[cfg(feature = "cuda")]
    if precision == Precision::Tf32 {
        super::ops::cuda::allow_tf32(device.as_cuda_device()?);
    }
    Ok((device, precision))
}

/// The compute capability of a GPU, major and minor; none for a CPU. Errors if the driver does not tell it.
pub fn compute_capability(device: &Device) -> Result<Option<(i32, i32)>> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(cuda) => Ok(Some(super::ops::cuda::compute_capability(cuda)?)),
        _ => Ok(None),
    }
}

#[cfg(not(feature = "cuda"))]
fn cuda(name: &str, _ordinal: usize) -> Result<Device> {
    Err(Error::input(format!(
        "device {name}: this program was built without CUDA; build it with --features cuda"
    )))
}

#[cfg(feature = "cuda")]
fn cuda(name: &str, ordinal: usize) -> Result<Device> {
    use candle_core::cuda_backend::cudarc::driver::CudaContext;

    let explain = |what: String| Error::input(format!("device {name}: {what}"));
    let count = match CudaContext::device_count() {
        Ok(count) => count as usize,
        Err(error) => return Err(explain(format!("no CUDA device ({:?})", error.0))),
    };
    match count {
        0 => return Err(explain("no CUDA device".into())),
        _ if ordinal >= count => {
            return Err(explain(format!("wanted one of the {count} CUDA devices from 0")));
        }
        _ => {}
    }
    super::ops::cuda::check_driver().map_err(explain)?;
    // A stream of the device's own: on candle's default, each thread has another, and their work is not ordered.
    let device = Device::new_cuda_with_stream(ordinal)?;
    super::ops::cuda::prepare(device.as_cuda_device()?)
        .map_err(|error| explain(format!("its driver cannot run our kernels: {}", Error::from(error))))?;
    Ok(device)
}

/// Bytes that are free on a GPU; none for a CPU, whose memory is the system's.
pub fn free_bytes(device: &Device) -> Result<Option<u64>> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(cuda) => Ok(Some(super::ops::cuda::free_bytes(cuda)?)),
        _ => Ok(None),
    }
}

/// Bytes of a GPU's memory; none for a CPU, whose memory is the system's.
pub fn total_bytes(device: &Device) -> Result<Option<u64>> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(cuda) => Ok(Some(super::ops::cuda::total_bytes(cuda)?)),
        _ => Ok(None),
    }
}

/// Hands memory of a GPU that was freed, and that we keep for our own next use, back to whoever wants it.
pub fn release(device: &Device) -> Result<()> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(cuda) => Ok(super::ops::cuda::release(cuda)?),
        _ => Ok(()),
    }
}
