// Layer normalisation (Ba et al., arXiv 1607.06450) and group normalisation (Wu and He, arXiv 1803.08494), the latter
// with an optional SiLU after it, and optionally something added to each channel of each sample before it. Variances are
// the mean of squared deviations from the mean, never E[x^2] - E[x]^2.
#include "common.cuh"

// y = (x - mean) * rstd * weight + bias over rows of `cols`; keeps mean and rstd of each row. One block per row.
extern "C" __global__ void layer_norm(const real* x, const float* weight, const float* bias, real* y, float* mean,
                                      float* rstd, int cols, float eps) {
    const real* row = x + (long long)blockIdx.x * cols;
    real* out = y + (long long)blockIdx.x * cols;
    float sum = 0.0f, squares = 0.0f;
    row1(row, cols, [&](float v) { sum += v; });
    const float m = block_sum(sum) / cols;
    row1(row, cols, [&](float v) { squares += (v - m) * (v - m); });
    const float r = 1.0f / sqrtf(block_sum(squares) / cols + eps);
    for (int i = threadIdx.x; i < cols; i += blockDim.x) {
        store(out + i, (load(row + i) - m) * r * weight[i] + bias[i]);
    }
    if (threadIdx.x == 0) {
        mean[blockIdx.x] = m;
        rstd[blockIdx.x] = r;
    }
}

// dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), g = dy * weight. One block per row. dx may be dy.
extern "C" __global__ void layer_norm_bwd(const real* x, const real* dy, const float* weight, const float* mean,
                                          const float* rstd, real* dx, int cols) {
    const real* row = x + (long long)blockIdx.x * cols;
    const real* grad = dy + (long long)blockIdx.x * cols;
    real* out = dx + (long long)blockIdx.x * cols;
    const float m = mean[blockIdx.x], r = rstd[blockIdx.x];
    float s1 = 0.0f, s2 = 0.0f;
    for (int i = threadIdx.x; i < cols; i += blockDim.x) {
        float g = load(grad + i) * weight[i];
        s1 += g;
        s2 += g * (load(row + i) - m) * r;
    }
    s1 = block_sum(s1) / cols;
    s2 = block_sum(s2) / cols;
    for (int i = threadIdx.x; i < cols; i += blockDim.x) {
        float g = load(grad + i) * weight[i], xhat = (load(row + i) - m) * r;
        store(out + i, r * (g - s1 - xhat * s2));
    }
}

// Partial sums over rows of dy * xhat (weight) and dy (bias); `sum_parts` ends them. Grid as `column_sum`: parts *
// ceil(cols / 32) blocks of 256 threads.
extern "C" __global__ void layer_norm_bwd_params(const real* x, const real* dy, const float* mean, const float* rstd,
                                                 float* weight_parts, float* bias_parts, int rows, int cols,
                                                 int rows_per_part) {
    __shared__ float weight_sums[8][32], bias_sums[8][32];
    int strips = (cols + 31) / 32, part = blockIdx.x / strips;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int col = blockIdx.x % strips * 32 + lane;
    long long start = (long long)part * rows_per_part;
    long long end = start + rows_per_part < rows ? start + rows_per_part : rows;
    float dw = 0.0f, db = 0.0f;
    if (col < cols) {
        for (long long row = start + warp; row < end; row += 8) {
            float d = load(dy + row * cols + col);
            dw += d * (load(x + row * cols + col) - mean[row]) * rstd[row];
            db += d;
        }
    }
    weight_sums[warp][lane] = dw;
    bias_sums[warp][lane] = db;
    __syncthreads();
    if (warp == 0 && col < cols) {
        for (int k = 1; k < 8; ++k) {
            dw += weight_sums[k][lane];
            db += bias_sums[k][lane];
        }
        weight_parts[(long long)part * cols + col] = dw;
        bias_parts[(long long)part * cols + col] = db;
    }
}

// Where part `part` of a group of `len` elements begins, when it is cut into `parts`, and how many it has. All but the
// last have the same number, which four divides.
struct Part {
    int start, n;
};
__device__ inline Part part_of(int part, int len, int parts) {
    int size = (len + parts - 1) / parts;
    size = (size + 3) / 4 * 4;
    int start = part * size < len ? part * size : len;
    return {start, start + size < len ? size : len - start};
}

// What is added to plane `i` before anything else; no shift at all may be given.
__device__ inline float shift_of(const real* shift, long long i) { return shift ? load(shift + i) : 0.0f; }

// f(value, plane within the group) for elements from..to of a group whose planes of `inner` elements follow one another,
// by the threads of one block; what it returns is written to y if that is not null. `shift` has one number for each
// plane of the group. Four divides `from`.
template <class F>
__device__ inline void map_group(const real* x, const real* shift, real* y, int inner, int from, int to, F f) {
    int i = from + 4 * threadIdx.x;
    if (inner % 4 == 0 && is_aligned(x) && is_aligned(y)) {
        for (; i + 3 < to; i += 4 * blockDim.x) {
            Four a = load4(x + i);
            const int plane = i / inner;
            const float more = shift_of(shift, plane);
            for (int k = 0; k < 4; ++k) a.v[k] = f(a.v[k] + more, plane);
            if (y) store4(y + i, a);
        }
    }
    for (; i < to; i += 4 * blockDim.x) {
        for (int k = i; k < i + 4 && k < to; ++k) {
            float v = f(load(x + k) + shift_of(shift, k / inner), k / inner);
            if (y) store(y + k, v);
        }
    }
}

// Mean of elements from..to of a group, and the sum of their squared deviations from it. Every thread of the block must
// call it.
__device__ inline void moments_of(const real* x, const real* shift, int inner, int from, int to, float* mean,
                                  float* deviations) {
    float sum = 0.0f, squares = 0.0f;
    map_group(x, shift, nullptr, inner, from, to, [&](float v, int) { return sum += v; });
    const float m = block_sum(sum) / (to > from ? to - from : 1);
    map_group(x, shift, nullptr, inner, from, to, [&](float v, int) { return squares += (v - m) * (v - m); });
    *mean = m;
    *deviations = block_sum(squares);
}

// y = act((x + shift - mean) * rstd * weight[c] + bias[c]), x [B, C, inner], shift [B, C] or null, its rows `pitch`
// elements apart; keeps mean and rstd of each group. One block per group: for groups small enough that one block is not
// long at it.
extern "C" __global__ void group_norm_whole(const real* x, const real* shift, int pitch, const float* weight,
                                            const float* bias, real* y, float* mean, float* rstd, int channels,
                                            int groups, int inner, float eps, int with_silu) {
    const int size = channels / groups, len = size * inner, first = blockIdx.x % groups * size;
    const real* in = x + (long long)blockIdx.x * len;
    const real* more = shift ? shift + (long long)(blockIdx.x / groups) * pitch + first : nullptr;
    float m, squares;
    moments_of(in, more, inner, 0, len, &m, &squares);
    const float r = 1.0f / sqrtf(squares / len + eps);
    map_group(in, more, y + (long long)blockIdx.x * len, inner, 0, len, [&](float v, int plane) {
        v = (v - m) * (r * weight[first + plane]) + bias[first + plane];
        return with_silu ? silu(v) : v;
    });
    if (threadIdx.x == 0) {
        mean[blockIdx.x] = m;
        rstd[blockIdx.x] = r;
    }
}

// Mean and sum of squared deviations of a part of each group of x + shift: x is B * groups runs of `len`, planes of
// `inner`, each run cut into `parts`. Grid: B * groups * parts blocks, the parts running fastest.
extern "C" __global__ void group_norm_parts(const real* x, const real* shift, int pitch, float* means,
                                            float* deviations, int len, int inner, int groups, int parts) {
    const long long group = blockIdx.x / parts;
    const real* more = shift ? shift + group / groups * pitch + group % groups * (len / inner) : nullptr;
    const Part part = part_of(blockIdx.x % parts, len, parts);
    float m, squares;
    moments_of(x + group * len, more, inner, part.start, part.start + part.n, &m, &squares);
    if (threadIdx.x == 0) {
        means[blockIdx.x] = m;
        deviations[blockIdx.x] = squares;
    }
}

// Joins the parts of a group (Chan, Golub and LeVeque 1979): mean and rstd. Every thread of the block must call it.
__device__ inline void join_parts(const float* means, const float* deviations, int len, int parts, float eps,
                                  float* mean, float* rstd) {
    float sum = 0.0f, squares = 0.0f;
    for (int i = threadIdx.x; i < parts; i += blockDim.x) sum += means[i] * part_of(i, len, parts).n;
    const float m = block_sum(sum) / len;
    for (int i = threadIdx.x; i < parts; i += blockDim.x) {
        const float gap = means[i] - m;
        squares += deviations[i] + gap * gap * part_of(i, len, parts).n;
    }
    *mean = m;
    *rstd = 1.0f / sqrtf(block_sum(squares) / len + eps);
}

// The channel, its group in `mean` and `rstd`, and the run of elements that one block works on, when each plane of
// `inner` elements of a [B, C, inner] tensor is cut into `cuts`.
struct Plane {
    int channel, group, from, to;
    long long index, base;
};
__device__ inline Plane plane_of(int channels, int groups, int inner, int cuts) {
    int size = (inner + cuts - 1) / cuts;
    size = (size + 3) / 4 * 4;
    Plane p;
    p.index = blockIdx.x / cuts;
    p.channel = (int)(p.index % channels);
    p.group = (int)(p.index / channels) * groups + p.channel / (channels / groups);
    p.from = blockIdx.x % cuts * size;
    p.to = p.from + size < inner ? p.from + size : inner;
    p.base = p.index * inner;
    return p;
}

// As `group_norm_whole`, from what `group_norm_parts` found. Grid: B * C * cuts blocks.
extern "C" __global__ void group_norm(const real* x, const real* shift, int pitch, const float* means,
                                      const float* deviations, const float* weight, const float* bias, real* y,
                                      float* mean, float* rstd, int channels, int groups, int inner, int cuts,
                                      int parts, float eps, int with_silu) {
    const Plane p = plane_of(channels, groups, inner, cuts);
    const int size = channels / groups;
    const long long first_part = (long long)p.group * parts;
    float m, r;
    join_parts(means + first_part, deviations + first_part, size * inner, parts, eps, &m, &r);
    const float scale = r * weight[p.channel], b = bias[p.channel];
    const real* more = shift ? shift + p.index / channels * pitch + p.channel : nullptr;
    map_group(x + p.base, more, y + p.base, inner, p.from, p.to, [&](float v, int) {
        v = (v - m) * scale + b;
        return with_silu ? silu(v) : v;
    });
    if (threadIdx.x == 0 && p.channel % size == 0 && p.from == 0) {
        mean[p.group] = m;
        rstd[p.group] = r;
    }
}

// The gradient before the SiLU, from the gradient after it.
__device__ inline float through_silu(float d, float xhat, float w, float b, int with_silu) {
    return with_silu ? d * silu_slope(xhat * w + b) : d;
}

// For each plane of [B, C, inner], the sums of g and g * xhat, where g is the gradient of the affine part's output.
// One block per plane. `sum_parts` over B makes them the gradients of bias and weight.
extern "C" __global__ void group_norm_bwd_sums(const real* x, const real* shift, const real* dy, const float* mean,
                                               const float* rstd, const float* weight, const float* bias,
                                               float* g_sums, float* gx_sums, int channels, int groups, int inner,
                                               int with_silu) {
    const Plane p = plane_of(channels, groups, inner, 1);
    const float w = weight[p.channel], b = bias[p.channel], r = rstd[p.group];
    const float m = mean[p.group] - shift_of(shift, p.index);
    float s1 = 0.0f, s2 = 0.0f;
    row2(x + p.base, dy + p.base, inner, [&](float v, float d) {
        float xhat = (v - m) * r;
        float g = through_silu(d, xhat, w, b, with_silu);
        s1 += g;
        s2 += g * xhat;
    });
    s1 = block_sum(s1);
    s2 = block_sum(s2);
    if (threadIdx.x == 0) {
        g_sums[blockIdx.x] = s1;
        gx_sums[blockIdx.x] = s2;
    }
}

// dx = rstd * (g * w - mean(g * w) - xhat * mean(g * w * xhat)), the means over the group. Grid: B * C * cuts blocks.
// dx may be dy.
extern "C" __global__ void group_norm_bwd(const real* x, const real* shift, const real* dy, const float* mean,
                                          const float* rstd, const float* weight, const float* bias,
                                          const float* g_sums, const float* gx_sums, real* dx, int channels,
                                          int groups, int inner, int cuts, int with_silu) {
    const Plane p = plane_of(channels, groups, inner, cuts);
    const float w = weight[p.channel], b = bias[p.channel], r = rstd[p.group];
    const float m = mean[p.group] - shift_of(shift, p.index);
    const int size = channels / groups;
    const long long first = p.index - p.channel % size; // the group's first plane
    const int first_channel = p.channel - p.channel % size;
    float s1 = 0.0f, s2 = 0.0f;
    for (int c = threadIdx.x; c < size; c += blockDim.x) {
        s1 += g_sums[first + c] * weight[first_channel + c];
        s2 += gx_sums[first + c] * weight[first_channel + c];
    }
    const float count = (float)size * inner;
    const float mean_g = block_sum(s1) / count, mean_gx = block_sum(s2) / count;
    const real *in = x + p.base, *grad = dy + p.base;
    real* out = dx + p.base;
    const bool wide = is_aligned(in) && is_aligned(grad) && is_aligned(out);
    for (int i = p.from + 4 * threadIdx.x; i < p.to; i += 4 * blockDim.x) {
        Four a, d;
        const bool whole = wide && i + 3 < p.to;
        const int n = i + 4 < p.to ? 4 : p.to - i;
        if (whole) {
            a = load4(in + i);
            d = load4(grad + i);
        } else {
            for (int k = 0; k < 4; ++k) {
                a.v[k] = k < n ? load(in + i + k) : 0.0f;
                d.v[k] = k < n ? load(grad + i + k) : 0.0f;
            }
        }
        for (int k = 0; k < 4; ++k) {
            float xhat = (a.v[k] - m) * r;
            float g = through_silu(d.v[k], xhat, w, b, with_silu);
            a.v[k] = r * (g * w - mean_g - xhat * mean_gx);
        }
        if (whole) {
            store4(out + i, a);
        } else {
            for (int k = 0; k < n; ++k) store(out + i + k, a.v[k]);
        }
    }
}
