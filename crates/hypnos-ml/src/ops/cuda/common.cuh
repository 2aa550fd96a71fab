// What the kernels share: the storage type, wide loads, reductions over a block, activations.
//
// Every .cu file here is compiled twice, with REAL = float and REAL = bf16 (build.rs): tensors are stored as REAL,
// arithmetic and sums are f32. Parameters that are vectors (biases, the weights of norms) and the gradients of all
// parameters are always f32. No kernel adds with atomics: the same input gives the same bits.
//
// A block has a multiple of 32 threads, at most 1024, in x alone. Counts that can pass 2^31 are `long long`.
#pragma once

// bfloat16 by its bits, so that no header of the toolkit and no minimum architecture is needed.
struct bf16 {
    unsigned short bits;
};

#ifndef REAL
#define REAL float
#endif
typedef REAL real;

__device__ inline float load(const float* p) { return *p; }
__device__ inline float load(const bf16* p) { return __uint_as_float((unsigned)p->bits << 16); }

// Round to nearest, ties to even; a NaN stays one.
__device__ inline bf16 to_bf16(float v) {
    unsigned u = __float_as_uint(v);
    bf16 r;
    r.bits = (v != v) ? 0x7fc0 : (unsigned short)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
    return r;
}
__device__ inline void store(float* p, float v) { *p = v; }
__device__ inline void store(bf16* p, float v) { *p = to_bf16(v); }

// Four neighbours in one memory transaction.
struct Four {
    float v[4];
};
template <class T> struct alignas(4 * sizeof(T)) Packed {
    T v[4];
};
template <class T> __device__ inline bool is_aligned(const T* p) { return (size_t)p % (4 * sizeof(T)) == 0; }
template <class T> __device__ inline Four load4(const T* p) {
    Packed<T> packed = *(const Packed<T>*)p;
    Four r;
    for (int k = 0; k < 4; ++k) r.v[k] = load(&packed.v[k]);
    return r;
}
template <class T> __device__ inline void store4(T* p, Four f) {
    Packed<T> packed;
    for (int k = 0; k < 4; ++k) store(&packed.v[k], f.v[k]);
    *(Packed<T>*)p = packed;
}

__device__ inline long long thread_index() { return (long long)blockIdx.x * blockDim.x + threadIdx.x; }
__device__ inline long long thread_count() { return (long long)gridDim.x * blockDim.x; }

// y[i] = f(x[i]) over the whole grid. y may be x.
template <class F> __device__ inline void map1(const real* x, real* y, long long n, F f) {
    long long done = 0;
    if (is_aligned(x) && is_aligned(y)) {
        done = n / 4 * 4;
        for (long long i = 4 * thread_index(); i < done; i += 4 * thread_count()) {
            Four a = load4(x + i);
            for (int k = 0; k < 4; ++k) a.v[k] = f(a.v[k]);
            store4(y + i, a);
        }
    }
    for (long long i = done + thread_index(); i < n; i += thread_count()) store(y + i, f(load(x + i)));
}

// z[i] = f(x[i], y[i]) over the whole grid. z may be x or y.
template <class F> __device__ inline void map2(const real* x, const real* y, real* z, long long n, F f) {
    long long done = 0;
    if (is_aligned(x) && is_aligned(y) && is_aligned(z)) {
        done = n / 4 * 4;
        for (long long i = 4 * thread_index(); i < done; i += 4 * thread_count()) {
            Four a = load4(x + i), b = load4(y + i);
            for (int k = 0; k < 4; ++k) a.v[k] = f(a.v[k], b.v[k]);
            store4(z + i, a);
        }
    }
    for (long long i = done + thread_index(); i < n; i += thread_count()) {
        store(z + i, f(load(x + i), load(y + i)));
    }
}

// f(value, value) for each pair x[i], y[i] of a row, by the threads of one block.
template <class S, class T, class F> __device__ inline void row2(const S* x, const T* y, int n, F f) {
    int done = 0;
    if (is_aligned(x) && is_aligned(y)) {
        done = n / 4 * 4;
        for (int i = 4 * threadIdx.x; i < done; i += 4 * blockDim.x) {
            Four a = load4(x + i), b = load4(y + i);
            for (int k = 0; k < 4; ++k) f(a.v[k], b.v[k]);
        }
    }
    for (int i = done + threadIdx.x; i < n; i += blockDim.x) f(load(x + i), load(y + i));
}

// f(value) for each x[i] of a row, by the threads of one block.
template <class T, class F> __device__ inline void row1(const T* x, int n, F f) {
    int done = 0;
    if (is_aligned(x)) {
        done = n / 4 * 4;
        for (int i = 4 * threadIdx.x; i < done; i += 4 * blockDim.x) {
            Four a = load4(x + i);
            for (int k = 0; k < 4; ++k) f(a.v[k]);
        }
    }
    for (int i = done + threadIdx.x; i < n; i += blockDim.x) f(load(x + i));
}

// The sum over the block, the same in every thread. Every thread of the block must call it.
__device__ inline float block_sum(float v) {
    __shared__ float warps[32];
    for (int mask = 16; mask > 0; mask /= 2) v += __shfl_xor_sync(0xffffffffu, v, mask);
    __syncthreads(); // the sums of the call before have been read
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
    __syncthreads();
    v = threadIdx.x % 32 < blockDim.x / 32 ? warps[threadIdx.x % 32] : 0.0f;
    for (int mask = 16; mask > 0; mask /= 2) v += __shfl_xor_sync(0xffffffffu, v, mask);
    return v;
}

// The largest value of the block, the same in every thread. Every thread of the block must call it.
__device__ inline float block_max(float v) {
    __shared__ float warps[32];
    for (int mask = 16; mask > 0; mask /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, mask));
    __syncthreads();
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
    __syncthreads();
    v = threadIdx.x % 32 < blockDim.x / 32 ? warps[threadIdx.x % 32] : -INFINITY;
    for (int mask = 16; mask > 0; mask /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, mask));
    return v;
}

// Activations and their derivatives.
__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

__device__ inline float silu(float x) { return x * sigmoid(x); }
__device__ inline float silu_slope(float x) {
    float s = sigmoid(x);
    return s * (1.0f + x * (1.0f - s));
}

// The exact GELU, x * Phi(x), of Hendrycks and Gimpel (arXiv 1606.08415); not its tanh approximation.
__device__ inline float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }
__device__ inline float gelu_slope(float x) {
    float density = 0.39894228040143268f * expf(-0.5f * x * x);
    return 0.5f * (1.0f + erff(x * 0.70710678118654752f)) + x * density;
}

// OpenAI CLIP's approximation: x * sigmoid(1.702 x).
__device__ inline float quick_gelu(float x) { return x * sigmoid(1.702f * x); }
__device__ inline float quick_gelu_slope(float x) {
    float s = sigmoid(1.702f * x);
    return s * (1.0f + 1.702f * x * (1.0f - s));
}
