// The functions of mma.cuh one by one, for check_tensor_cores.cpp, and mistakes with them.
#include "device.h"

#include "../../crates/hypnos-ml/src/ops/cuda/mma.cuh"

// c += a b with the registers of each lane as they stand in memory: four of a, two of b, four of c.
extern "C" __global__ void multiply_fragments(const unsigned* a, const unsigned* b, float* c, int depth) {
    const int lane = threadIdx.x;
    unsigned left[4];
    float sums[4];
    for (int i = 0; i < 4; ++i) left[i] = a[4 * lane + i], sums[i] = c[4 * lane + i];
    if (depth == 16) {
        mma_16x8x16(sums, left, b[2 * lane], b[2 * lane + 1]);
    } else {
        mma_16x8x8(sums, left, b[2 * lane]);
    }
    for (int i = 0; i < 4; ++i) c[4 * lane + i] = sums[i];
}

// 32 rows of 16 bytes; r gets what each lane loads. wait: whether the copies are waited for; the rest is as it should
// be if `beyond` is 0.
extern "C" __global__ void load_fragments(const bf16* rows, unsigned* r, int transposed, int count, int wait,
                                          int beyond) {
    DYNAMIC_SHARED(bf16, tile);
    const int lane = threadIdx.x;
    copy_16_bytes(tile + 8 * lane, rows + 8 * lane + beyond, true);
    if (wait) wait_for_copies();
    __syncthreads();
    unsigned mine[4] = {};
    const bf16* row = count == 4 ? tile + 8 * lane : lane < 16 ? tile + 8 * lane : nullptr;
    if (count == 2) {
        load_2_transposed(mine, row);
    } else if (transposed) {
        load_4_transposed(mine, row);
    } else {
        load_4_matrices(mine, row);
    }
    for (int i = 0; i < 4; ++i) r[4 * lane + i] = mine[i];
    wait_for_copies();
}

// The next copy begins while others may still read the last.
extern "C" __global__ void copy_too_soon(const bf16* rows, float* y, int with_barrier) {
    DYNAMIC_SHARED(bf16, tile);
    float sum = 0;
    for (int round = 0; round < 2; ++round) {
        copy_16_bytes(tile + 8 * threadIdx.x, rows + 8 * threadIdx.x, round == 0);
        wait_for_copies();
        __syncthreads();
        sum += load(tile + 8 * (31 - threadIdx.x));
        if (with_barrier) __syncthreads();
    }
    y[threadIdx.x] = sum;
}

extern "C" __global__ void copy_without_end(const bf16* rows) {
    DYNAMIC_SHARED(bf16, tile);
    copy_16_bytes(tile + 8 * threadIdx.x, rows + 8 * threadIdx.x, true);
}

extern "C" __global__ void mma_for_some(float* c) {
    float sums[4] = {};
    const unsigned a[4] = {};
    if (threadIdx.x < 16) mma_16x8x16(sums, a, 0, 0);
    c[threadIdx.x] = sums[0];
}
