// Kernels with mistakes, each of which check.cpp wants to be found.
#include "device.h"

// The second phase reads what a neighbour writes, without the barrier that belongs between them.
extern "C" __global__ void race_in_shared(const float* x, float* y) {
    __shared__ float values[64];
    values[threadIdx.x] = 0;
    __syncthreads();
    values[threadIdx.x] = x[threadIdx.x];
    y[threadIdx.x] = values[63 - threadIdx.x];
}

// A warp that exchanges through shared memory needs __syncwarp, even if its lanes happen to run in step.
extern "C" __global__ void race_in_a_warp(const float* x, float* y, int with_barrier) {
    __shared__ float values[32];
    values[threadIdx.x] = 0;
    __syncwarp();
    values[threadIdx.x] = x[threadIdx.x];
    if (with_barrier) __syncwarp();
    y[threadIdx.x] = values[31 - threadIdx.x];
}

// Thread 0 waits for the readers of its own warp, but not for those of the other one.
extern "C" __global__ void race_of_warps(const float* x, float* y) {
    __shared__ float value;
    if (threadIdx.x == 0) value = x[0];
    __syncthreads();
    y[threadIdx.x] = value;
    __syncwarp();
    if (threadIdx.x == 0) value = x[1];
}

// Two blocks add to one place.
extern "C" __global__ void race_of_blocks(const float* x, float* sum) {
    if (threadIdx.x == 0) sum[0] += x[blockIdx.x];
}

// The next round writes what others may still be reading.
extern "C" __global__ void race_of_rounds(float* y, int rounds, int with_barrier) {
    __shared__ float value;
    float sum = 0;
    for (int round = 0; round < rounds; ++round) {
        if (threadIdx.x == 0) value = round;
        __syncthreads();
        sum += value;
        if (with_barrier) __syncthreads();
    }
    y[threadIdx.x] = sum;
}

// `<=` where `<` belongs.
extern "C" __global__ void overrun(const float* x, float* y, int n) {
    for (int i = threadIdx.x; i <= n; i += blockDim.x) y[i] = 2 * x[i];
}

// Rows of `cols`, `pitch` apart.
extern "C" __global__ void transpose(const float* x, float* y, int rows, int cols, int pitch) {
    for (int i = threadIdx.x; i < rows * cols; i += blockDim.x) {
        y[i % cols * rows + i / cols] = x[i / cols * pitch + i % cols];
    }
}

// Every second element is forgotten.
extern "C" __global__ void gaps(const float* x, float* y, int n) {
    for (int i = 2 * threadIdx.x; i < n; i += 2 * blockDim.x) y[i] = x[i];
}

extern "C" __global__ void unwritten_shared(float* y) {
    __shared__ float values[32];
    if (threadIdx.x < 31) values[threadIdx.x] = 1;
    __syncthreads();
    y[threadIdx.x] = values[threadIdx.x];
}

extern "C" __global__ void barrier_for_some(float* y) {
    if (threadIdx.x < 32) {
        y[threadIdx.x] = 1;
        __syncthreads();
    } else {
        __syncthreads();
    }
}

extern "C" __global__ void shuffle_for_some(float* y) {
    if (threadIdx.x % 32 < 16) y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

extern "C" __global__ void shuffle_with_two_masks(float* y) {
    const unsigned mask = threadIdx.x < 16 ? 0xffffffffu : 0xffff0000u;
    y[threadIdx.x] = __shfl_xor_sync(mask, 1.0f, 1);
}

extern "C" __global__ void shuffle_in_two_places(float* y) {
    if (threadIdx.x < 16) {
        y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
    } else {
        y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 2.0f, 1);
    }
}

extern "C" __global__ void misaligned(const float* x, double* y) { y[0] = *(const double*)(x + 1); }

extern "C" __global__ void freed(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }

// Asks for one element more than the launch has.
extern "C" __global__ void dynamic_overrun(const float* x, float* y, int n) {
    DYNAMIC_SHARED(float, values);
    for (int i = threadIdx.x; i < n; i += blockDim.x) values[i] = x[i % 64];
    __syncthreads();
    y[threadIdx.x] = values[n - 1 - threadIdx.x];
}
