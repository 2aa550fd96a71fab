// AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, as torch.optim.AdamW computes it) over every parameter
// in one launch, and the sums for the gradients' norm. REAL is the storage of the gradients.
#include "common.cuh"

// One parameter. Mirrored on the Rust side, in this order.
struct Slot {
    float* value;
    float* mean;     // first moment
    float* variance; // second moment
    const real* grad;
    bf16* narrow; // the copy that is computed with, or null
    long long len;
};

// A run of up to CHUNK elements of one slot: the work of one block.
struct Chunk {
    int slot;
    int index;
};
enum { CHUNK = 65536 };

// sums[chunk] = sum of squares of the chunk's gradient. One block per chunk.
extern "C" __global__ void sum_squares(const Slot* slots, const Chunk* chunks, float* sums) {
    const Chunk chunk = chunks[blockIdx.x];
    const Slot slot = slots[chunk.slot];
    const long long start = (long long)chunk.index * CHUNK;
    const int n = (int)(slot.len - start < CHUNK ? slot.len - start : CHUNK);
    float sum = 0.0f;
    row1(slot.grad + start, n, [&](float g) { sum += g * g; });
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// One step. `clip` is the factor on every gradient; rate = lr / (1 - beta1^t), correction = 1 / sqrt(1 -
// beta2^t), keep = 1 - lr * decay. One block per chunk.
extern "C" __global__ void adamw(const Slot* slots, const Chunk* chunks, float clip, float beta1, float beta2,
                                 float rate, float correction, float eps, float keep) {
    const Chunk chunk = chunks[blockIdx.x];
    const Slot slot = slots[chunk.slot];
    const long long start = (long long)chunk.index * CHUNK;
    const long long end = slot.len - start < CHUNK ? slot.len : start + CHUNK;
    for (long long i = start + threadIdx.x; i < end; i += blockDim.x) {
        const float g = load(slot.grad + i) * clip;
        const float m = slot.mean[i] + (1.0f - beta1) * (g - slot.mean[i]);
        const float v = beta2 * slot.variance[i] + (1.0f - beta2) * g * g;
        const float p = slot.value[i] * keep - rate * m / (sqrtf(v) * correction + eps);
        slot.mean[i] = m;
        slot.variance[i] = v;
        slot.value[i] = p;
        if (slot.narrow) store(slot.narrow + i, p);
    }
}

// One parameter whose moments are in 8 bits (blockwise.rs). Mirrored on the Rust side, in this order.
struct Slot8 {
    float* value;
    unsigned char* mean;
    unsigned char* variance;
    float* mean_scales;     // one for each block of 256 elements
    float* variance_scales;
    const real* grad;
    bf16* narrow; // as in Slot
    long long len;
};
enum { BLOCK = 256, PER_LANE = BLOCK / 32 };

__device__ inline float warp_max(float v) {
    for (int mask = 16; mask > 0; mask /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, mask));
    return v;
}

// The scale of a block, of which each lane of a warp has PER_LANE numbers: the one of largest magnitude.
__device__ inline float scale_of(const float (&x)[PER_LANE]) {
    float high = 0.0f, low = 0.0f;
    for (int k = 0; k < PER_LANE; ++k) {
        high = fmaxf(high, x[k]);
        low = fmaxf(low, -x[k]);
    }
    high = warp_max(high);
    low = warp_max(low);
    return high >= low ? high : -low;
}

// The code whose value is nearest to x, which is at most 1; the larger of two.
__device__ inline int nearest(float x, const float* values) {
    int code = 0;
    for (int step = 128; step > 0; step /= 2) {
        if (values[code + step] <= x) code += step;
    }
    if (code < 255 && values[code + 1] - x <= x - values[code]) ++code;
    return code;
}

// The step of `adamw` with moments in 8 bits. A weight moves by its new moments as they are before they are rounded to
// codes. `values` has the values of the codes: 256 of both signs for the first moment, then 256 that are not negative
// for the second. One block of threads per chunk; each of its warps takes one block of 256 elements at a time.
extern "C" __global__ void adamw_8bit(const Slot8* slots, const Chunk* chunks, const float* values, float clip,
                                      float beta1, float beta2, float rate, float correction, float eps, float keep) {
    __shared__ float both[512];
    for (int i = threadIdx.x; i < 512; i += blockDim.x) both[i] = values[i];
    __syncthreads();
    const float *signed_values = both, *unsigned_values = both + 256;
    const Chunk chunk = chunks[blockIdx.x];
    const Slot8 slot = slots[chunk.slot];
    const long long start = (long long)chunk.index * CHUNK;
    const long long end = slot.len - start < CHUNK ? slot.len : start + CHUNK;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
    for (long long at = start + warp * BLOCK; at < end; at += n_warps * BLOCK) {
        const float old_mean = slot.mean_scales[at / BLOCK], old_variance = slot.variance_scales[at / BLOCK];
        float mean[PER_LANE], variance[PER_LANE];
        for (int k = 0; k < PER_LANE; ++k) {
            const long long i = at + lane + 32 * k;
            mean[k] = variance[k] = 0.0f;
            if (i >= end) continue;
            const float g = load(slot.grad + i) * clip;
            const float m = signed_values[slot.mean[i]] * old_mean;
            const float v = unsigned_values[slot.variance[i]] * old_variance;
            mean[k] = m + (1.0f - beta1) * (g - m);
            variance[k] = beta2 * v + (1.0f - beta2) * g * g;
            const float p = slot.value[i] * keep - rate * mean[k] / (sqrtf(variance[k]) * correction + eps);
            slot.value[i] = p;
            if (slot.narrow) store(slot.narrow + i, p);
        }
        const float mean_scale = scale_of(mean), variance_scale = scale_of(variance);
        for (int k = 0; k < PER_LANE; ++k) {
            const long long i = at + lane + 32 * k;
            if (i >= end) continue;
            slot.mean[i] = mean_scale == 0.0f ? 127 : nearest(mean[k] / mean_scale, signed_values);
            const int code = variance_scale == 0.0f ? 0 : nearest(variance[k] / variance_scale, unsigned_values);
            slot.variance[i] = variance[k] > 0.0f && code == 0 ? 1 : code; // a step is divided by its root
        }
        __syncwarp(); // every lane has read the old scales
        if (lane == 0) {
            slot.mean_scales[at / BLOCK] = mean_scale;
            slot.variance_scales[at / BLOCK] = variance_scale;
        }
    }
}
