//! Errors of the core as faults of a job.

use std::path::Path;

use crate::job::{Fault, FaultCode};
use crate::ml::Error;

/// The fault of a job that failed by `error`, where nothing more specific is known.
pub(super) fn fault(error: Error) -> Fault {
    let words = error.to_string();
    match error {
        Error::Diverged { .. } => Fault::new(FaultCode::Diverged, words),
        Error::OutOfMemory(_) => Fault::new(FaultCode::Machine, words),
        Error::DeviceLost(_) => Fault::device_lost(words),
        Error::File { .. }
        | Error::Setting { .. }
        | Error::Input(_)
        | Error::NotFinite(_)
        | Error::Tensor(_) => Fault::new(FaultCode::Internal, words),
    }
}

/// The fault of a job that cannot read a file of its own. Clients and logs see no paths: the file is called `name`.
pub(super) fn unreadable(error: Error, file: &Path, name: &str) -> Fault {
    if error.is_input() {
        let words = error.renamed(file, name.as_ref()).to_string();
        return Fault::new(FaultCode::ArtifactMissing, words);
    }
    fault(error)
}

/// The fault of a job that cannot write a file of its own: the disk's. The file is called `name`.
pub(super) fn unwritable(error: Error, file: &Path, name: &str) -> Fault {
    Fault::new(FaultCode::Machine, error.renamed(file, name.as_ref()).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_without_memory_is_kept_and_one_that_fails_otherwise_is_not() {
        let of = |words: &str| {
            let fault = fault(Error::from(candle_core::Error::Msg(words.into())));
            (fault.code, fault.device_lost)
        };
        let memory = "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")";
        assert_eq!(of(memory), (FaultCode::Machine, false));
        assert_eq!(of("CublasError(CUBLAS_STATUS_ALLOC_FAILED)"), (FaultCode::Machine, false));
        let sticky = "DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, \"an illegal memory access was encountered\")";
        assert_eq!(of(sticky), (FaultCode::Machine, true));
        assert_eq!(of("CublasError(CUBLAS_STATUS_EXECUTION_FAILED)"), (FaultCode::Machine, true));
        assert_eq!(of("CudnnError(CUDNN_STATUS_INTERNAL_ERROR)"), (FaultCode::Machine, true));
        assert_eq!(of("shape mismatch in add"), (FaultCode::Internal, false));
    }
}
