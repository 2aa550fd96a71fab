// AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, as torch.optim.AdamW computes it) over every parameter
// in one launch, and the sums for the gradients' norm. REAL is the storage of the gradients.
#include "common.cuh"

// One parameter. Mirrored on the Rust side, in this order.
struct Slot {
    float* value;
    float* mean;     // first moment
    float* variance; // second moment
    const real* grad;
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
    }
}
