// Pictures: nearest upsampling, depthwise convolution, and the gathers behind a convolution by matrix product.
// All tensors are [B, C, H, W] row-major. A kernel with `n` has one thread per element of its result; any grid.
#include "common.cuh"

// The first place in the result that reads input `i`: the smallest o with o * in / out == i, rounded down.
__device__ inline int first_reader(int i, int in, int out) { return (int)(((long long)i * out + in - 1) / in); }

// y[.., oy, ox] = x[.., oy * h / out_h, ox * w / out_w], integer division: any size, up or down.
extern "C" __global__ void upsample(const real* x, real* y, long long n, int h, int w, int out_h, int out_w) {
    for (long long i = thread_index(); i < n; i += thread_count()) {
        int ox = (int)(i % out_w), oy = (int)(i / out_w % out_h);
        long long plane = i / out_w / out_h;
        int ix = (int)((long long)ox * w / out_w), iy = (int)((long long)oy * h / out_h);
        store(y + i, load(x + (plane * h + iy) * w + ix));
    }
}

// dx = the sum of dy over all places that read it. n elements of dx.
extern "C" __global__ void upsample_bwd(const real* dy, real* dx, long long n, int h, int w, int out_h, int out_w) {
    for (long long i = thread_index(); i < n; i += thread_count()) {
        int ix = (int)(i % w), iy = (int)(i / w % h);
        const real* plane = dy + i / w / h * out_h * out_w;
        int y_end = first_reader(iy + 1, h, out_h), x_end = first_reader(ix + 1, w, out_w);
        float sum = 0.0f;
        for (int oy = first_reader(iy, h, out_h); oy < y_end; ++oy) {
            for (int ox = first_reader(ix, w, out_w); ox < x_end; ++ox) sum += load(plane + (long long)oy * out_w + ox);
        }
        store(dx + i, sum);
    }
}

// The shape of a convolution window; passed by value.
struct Window {
    int h, w, out_h, out_w, k_h, k_w, stride, pad_top, pad_left, dilation;
};

// y[b, c] = x[b, c] correlated with weight[c] (f32, [C, 1, k_h, k_w]). n elements of y.
extern "C" __global__ void depthwise(const real* x, const float* weight, real* y, long long n, int channels, Window s) {
    for (long long i = thread_index(); i < n; i += thread_count()) {
        int ox = (int)(i % s.out_w), oy = (int)(i / s.out_w % s.out_h);
        long long plane = i / s.out_w / s.out_h;
        const real* in = x + plane * s.h * s.w;
        const float* k = weight + plane % channels * s.k_h * s.k_w;
        float sum = 0.0f;
        for (int ky = 0; ky < s.k_h; ++ky) {
            int iy = oy * s.stride - s.pad_top + ky * s.dilation;
            if (iy < 0 || iy >= s.h) continue;
            for (int kx = 0; kx < s.k_w; ++kx) {
                int ix = ox * s.stride - s.pad_left + kx * s.dilation;
                if (ix >= 0 && ix < s.w) sum += load(in + (long long)iy * s.w + ix) * k[ky * s.k_w + kx];
            }
        }
        store(y + i, sum);
    }
}

// The place in the result that tap `k` of the window reads input `i` for, or -1.
__device__ inline int reader(int i, int k, int pad, int stride, int dilation, int out) {
    int o = i + pad - k * dilation;
    return o >= 0 && o % stride == 0 && o / stride < out ? o / stride : -1;
}

// dx of `depthwise`. n elements of dx.
extern "C" __global__ void depthwise_bwd(const real* dy, const float* weight, real* dx, long long n, int channels,
                                         Window s) {
    for (long long i = thread_index(); i < n; i += thread_count()) {
        int ix = (int)(i % s.w), iy = (int)(i / s.w % s.h);
        long long plane = i / s.w / s.h;
        const real* grad = dy + plane * s.out_h * s.out_w;
        const float* k = weight + plane % channels * s.k_h * s.k_w;
        float sum = 0.0f;
        for (int ky = 0; ky < s.k_h; ++ky) {
            int oy = reader(iy, ky, s.pad_top, s.stride, s.dilation, s.out_h);
            if (oy < 0) continue;
            for (int kx = 0; kx < s.k_w; ++kx) {
                int ox = reader(ix, kx, s.pad_left, s.stride, s.dilation, s.out_w);
                if (ox >= 0) sum += load(grad + (long long)oy * s.out_w + ox) * k[ky * s.k_w + kx];
            }
        }
        store(dx + i, sum);
    }
}

// d_weight of `depthwise`, f32. One block per weight: C * k_h * k_w blocks.
extern "C" __global__ void depthwise_bwd_weight(const real* x, const real* dy, float* d_weight, int batch, int channels,
                                                Window s) {
    const int kx = blockIdx.x % s.k_w, ky = blockIdx.x / s.k_w % s.k_h, c = blockIdx.x / (s.k_w * s.k_h);
    const int area = s.out_h * s.out_w;
    float sum = 0.0f;
    for (int b = 0; b < batch; ++b) {
        const real* in = x + ((long long)b * channels + c) * s.h * s.w;
        const real* grad = dy + ((long long)b * channels + c) * area;
        for (int o = threadIdx.x; o < area; o += blockDim.x) {
            int iy = o / s.out_w * s.stride - s.pad_top + ky * s.dilation;
            int ix = o % s.out_w * s.stride - s.pad_left + kx * s.dilation;
            if (iy >= 0 && iy < s.h && ix >= 0 && ix < s.w) sum += load(grad + o) * load(in + (long long)iy * s.w + ix);
        }
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) d_weight[blockIdx.x] = sum;
}

// columns[plane * k_h * k_w + tap, place] = the input that `tap` reads at `place`, 0 outside: planes = B * C, so that
// [C * k_h * k_w, out_h * out_w] of each sample is the right-hand side of weight x columns. n elements of columns.
extern "C" __global__ void gather_columns(const real* x, real* columns, long long n, Window s) {
    for (long long i = thread_index(); i < n; i += thread_count()) {
        int ox = (int)(i % s.out_w), oy = (int)(i / s.out_w % s.out_h);
        long long row = i / s.out_w / s.out_h;
        int kx = (int)(row % s.k_w), ky = (int)(row / s.k_w % s.k_h);
        long long plane = row / s.k_w / s.k_h;
        int iy = oy * s.stride - s.pad_top + ky * s.dilation, ix = ox * s.stride - s.pad_left + kx * s.dilation;
        bool inside = iy >= 0 && iy < s.h && ix >= 0 && ix < s.w;
        store(columns + i, inside ? load(x + (plane * s.h + iy) * s.w + ix) : 0.0f);
    }
}

// The transpose of `gather_columns`: x = the sum of the columns that read it. n elements of x.
extern "C" __global__ void scatter_columns(const real* columns, real* x, long long n, Window s) {
    const long long area = (long long)s.out_h * s.out_w;
    for (long long i = thread_index(); i < n; i += thread_count()) {
        int ix = (int)(i % s.w), iy = (int)(i / s.w % s.h);
        const real* rows = columns + i / s.w / s.h * s.k_h * s.k_w * area;
        float sum = 0.0f;
        for (int ky = 0; ky < s.k_h; ++ky) {
            int oy = reader(iy, ky, s.pad_top, s.stride, s.dilation, s.out_h);
            if (oy < 0) continue;
            for (int kx = 0; kx < s.k_w; ++kx) {
                int ox = reader(ix, kx, s.pad_left, s.stride, s.dilation, s.out_w);
                if (ox >= 0) sum += load(rows + (ky * s.k_w + kx) * area + (long long)oy * s.out_w + ox);
            }
        }
        store(x + i, sum);
    }
}
