// Softmax over the last dimension, for attention: scaled, and causal where asked.
#include "common.cuh"

// How many columns of this row are visible: all, or as far as the query's own place. Rows run over queries fastest.
__device__ inline int visible(int cols, int queries, int causal) {
    int q = blockIdx.x % queries;
    return causal && q + 1 < cols ? q + 1 : cols;
}

// y = softmax(scale * x) over each row's visible columns, 0 in the others. One block per row. y may be x.
extern "C" __global__ void softmax(const real* x, real* y, int cols, int queries, float scale, int causal) {
    const int n = visible(cols, queries, causal);
    const real* row = x + (long long)blockIdx.x * cols;
    real* out = y + (long long)blockIdx.x * cols;
    // One pass keeps the largest value so far and the sum of exponentials relative to it (Milakov and Gimelshein,
    // arXiv 1805.02867).
    float top = -INFINITY, sum = 0.0f;
    row1(row, n, [&](float v) {
        v *= scale;
        if (v > top) {
            sum = sum * expf(top - v) + 1.0f;
            top = v;
        } else if (v != -INFINITY) { // a column masked by an added -inf counts for nothing
            sum += expf(v - top);
        }
    });
    const float m = block_max(top);
    const float total = block_sum(top == -INFINITY ? 0.0f : sum * expf(top - m));
    const float over = 1.0f / total;
    for (int i = threadIdx.x; i < cols; i += blockDim.x) {
        store(out + i, i < n ? expf(load(row + i) * scale - m) * over : 0.0f);
    }
}

// dx = scale * y * (dy - sum(dy * y)). One block per row. dx may be dy. Masked columns have y = 0, hence dx = 0.
extern "C" __global__ void softmax_bwd(const real* y, const real* dy, real* dx, int cols, float scale) {
    const real* row = y + (long long)blockIdx.x * cols;
    const real* grad = dy + (long long)blockIdx.x * cols;
    real* out = dx + (long long)blockIdx.x * cols;
    float sum = 0.0f;
    row2(row, grad, cols, [&](float p, float d) { sum += p * d; });
    const float dot = block_sum(sum);
    for (int i = threadIdx.x; i < cols; i += blockDim.x) {
        store(out + i, scale * load(row + i) * (load(grad + i) - dot));
    }
}
