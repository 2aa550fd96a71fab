// AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, as torch.optim.AdamW computes it) over every parameter
// in one launch, and the gradient's norm for clipping. REAL is the storage of the gradients.
#include "common.cuh"

// One parameter. Mirrored on the Rust side, in this order.
struct Slot {
    float* value;
    float* mean;     // first moment
    float* variance; // second moment
    const real* grad;
    bf16* copy; // the value in bf16 for the next forward pass, or null
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

// out = [scale, norm]: norm = sqrt(sum of sums), scale = min(1, max_norm / (norm + 1e-6)) as torch's clip_grad_norm_;
// max_norm <= 0 means no clipping. A norm that is not a number gives a scale that is not one either. One block.
extern "C" __global__ void clip_scale(const float* sums, float* out, int n, float max_norm) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += sums[i];
    const float norm = sqrtf(block_sum(sum));
    if (threadIdx.x == 0) {
        const float scale = max_norm / (norm + 1e-6f);
        out[0] = max_norm <= 0.0f || scale >= 1.0f ? 1.0f : scale;
        out[1] = norm;
    }
}

// One step. `clip` points at the factor on every gradient; rate = lr / (1 - beta1^t), correction = 1 / sqrt(1 -
// beta2^t), keep = 1 - lr * decay. One block per chunk.
extern "C" __global__ void adamw(const Slot* slots, const Chunk* chunks, const float* clip, float beta1, float beta2,
                                 float rate, float correction, float eps, float keep) {
    const Chunk chunk = chunks[blockIdx.x];
    const Slot slot = slots[chunk.slot];
    const long long start = (long long)chunk.index * CHUNK;
    const long long end = slot.len - start < CHUNK ? slot.len : start + CHUNK;
    const float by = clip[0];
    for (long long i = start + threadIdx.x; i < end; i += blockDim.x) {
        const float g = load(slot.grad + i) * by;
        const float m = slot.mean[i] + (1.0f - beta1) * (g - slot.mean[i]);
        const float v = beta2 * slot.variance[i] + (1.0f - beta2) * g * g;
        const float p = slot.value[i] * keep - rate * m / (sqrtf(v) * correction + eps);
        slot.mean[i] = m;
        slot.variance[i] = v;
        slot.value[i] = p;
        if (slot.copy) slot.copy[i] = to_bf16(p);
    }
}
