// Softmax over the last dimension: of any tensor, and of attention's scores, scaled and causal where asked.
#include "common.cuh"

// y = softmax(scale * x) over the first n columns of a row, 0 in the others. y may be x.
template <class T> __device__ inline void softmax_row(const T* x, real* y, int cols, int n, float scale) {
    // One pass keeps the largest value so far and the sum of exponentials relative to it (Milakov and Gimelshein,
    // arXiv 1805.02867).
    float top = -INFINITY, sum = 0.0f;
    row1(x, n, [&](float v) {
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
        store(y + i, i < n ? expf(load(x + i) * scale - m) * over : 0.0f);
    }
}

// dx = scale * y * (dy - sum(dy * y) / sum(y)) over a row. dx may be dy. Masked columns have y = 0, hence dx = 0. As it is
// stored in bf16, y does not sum to 1 exactly; without the quotient, what all of dy have in common would not cancel.
template <class T> __device__ inline void softmax_row_bwd(const real* y, const T* dy, real* dx, int cols, float scale) {
    float sum = 0.0f, total = 0.0f;
    row2(y, dy, cols, [&](float p, float d) {
        sum += p * d;
        total += p;
    });
    const float dot = block_sum(sum) / block_sum(total);
    for (int i = threadIdx.x; i < cols; i += blockDim.x) store(dx + i, scale * load(y + i) * (load(dy + i) - dot));
}

// y = softmax(x) over rows of `cols`. One block per row. y may be x.
extern "C" __global__ void softmax(const real* x, real* y, int cols) {
    const long long at = (long long)blockIdx.x * cols;
    softmax_row(x + at, y + at, cols, cols, 1.0f);
}

// One block per row. dx may be dy.
extern "C" __global__ void softmax_bwd(const real* y, const real* dy, real* dx, int cols) {
    const long long at = (long long)blockIdx.x * cols;
    softmax_row_bwd(y + at, dy + at, dx + at, cols, 1.0f);
}

// p = softmax(scale * scores), scores [heads, queries, cols] and f32. Where causal, a query sees the columns up to its
// own place; the place of the first is `first`. One block per row. p may be scores if it is f32 too.
extern "C" __global__ void attention_softmax(const float* scores, real* p, int cols, int queries, int first, float scale,
                                             int causal) {
    const long long at = (long long)blockIdx.x * cols;
    const int place = first + blockIdx.x % queries;
    const int n = causal && place + 1 < cols ? place + 1 : cols;
    softmax_row(scores + at, p + at, cols, n, scale);
}

// The gradient of the unscaled scores, from that of p, f32. One block per row. ds may be dp if it is f32 too.
extern "C" __global__ void attention_softmax_bwd(const real* p, const float* dp, real* ds, int cols, float scale) {
    const long long at = (long long)blockIdx.x * cols;
    softmax_row_bwd(p + at, dp + at, ds + at, cols, scale);
}
