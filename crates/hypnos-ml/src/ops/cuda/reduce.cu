// Sums for the gradients of biases and other vectors, in two stages whose order never changes.
#include "common.cuh"

// out[p] = sum of plane p, planes of `inner` elements one after the other. One block per plane.
extern "C" __global__ void plane_sum(const real* x, float* out, int inner) {
    float sum = 0.0f;
    row1(x + (long long)blockIdx.x * inner, inner, [&](float v) { sum += v; });
    sum = block_sum(sum);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// out[c] = sum of x[image, c, place] over images and places, x [images, channels, inner]: a channel bias's gradient. One
// block per channel.
extern "C" __global__ void channel_sum(const real* x, float* out, int images, int channels, int inner) {
    float sum = 0.0f;
    for (int image = 0; image < images; ++image) {
        row1(x + ((long long)image * channels + blockIdx.x) * inner, inner, [&](float v) { sum += v; });
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// parts[part, c] = sum over this part's rows of x[row, c]. Grid: parts * ceil(cols / 32) blocks of 256 threads, the
// columns running fastest. Stage one of a row bias's gradient.
extern "C" __global__ void column_sum(const real* x, float* parts, int rows, int cols, int rows_per_part) {
    __shared__ float sums[8][32];
    int strips = (cols + 31) / 32, part = blockIdx.x / strips;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int col = blockIdx.x % strips * 32 + lane;
    long long start = (long long)part * rows_per_part;
    long long end = start + rows_per_part < rows ? start + rows_per_part : rows;
    float sum = 0.0f;
    if (col < cols) {
        for (long long row = start + warp; row < end; row += 8) sum += load(x + row * cols + col);
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && col < cols) {
        for (int k = 1; k < 8; ++k) sum += sums[k][lane];
        parts[(long long)part * cols + col] = sum;
    }
}

// out[k, c] = sum over parts of parts[k, part, c], of `stacks` stacks. Any grid.
extern "C" __global__ void sum_parts(const float* parts, float* out, int stacks, int n_parts, int cols) {
    for (long long i = thread_index(); i < (long long)stacks * cols; i += thread_count()) {
        const float* from = parts + i / cols * n_parts * cols + i % cols;
        float sum = 0.0f;
        for (int part = 0; part < n_parts; ++part) sum += from[(long long)part * cols];
        out[i] = sum;
    }
}
