// Seven of our kernels, compiled without their __syncthreads. check.cpp launches each, and each launch must fail.
#include "device.h"

#define __syncthreads() ((void)0)
#include "../../crates/hypnos-ml/src/ops/cuda/adamw.cu"
#include "../../crates/hypnos-ml/src/ops/cuda/norm.cu"
#include "../../crates/hypnos-ml/src/ops/cuda/reduce.cu"
#include "../../crates/hypnos-ml/src/ops/cuda/softmax.cu"

extern "C" const SoftwareKernel software_cuda_kernels[];
const SoftwareKernel software_cuda_kernels[] = {
    SOFTWARE_KERNEL(adamw_8bit),       SOFTWARE_KERNEL(channel_sum),      SOFTWARE_KERNEL(column_sum),
    SOFTWARE_KERNEL(group_norm_parts), SOFTWARE_KERNEL(group_norm_whole), SOFTWARE_KERNEL(layer_norm),
    SOFTWARE_KERNEL(plane_sum),        SOFTWARE_KERNEL(softmax),          {},
};
