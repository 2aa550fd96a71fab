// Operations on each element: activations, GEGLU, bias.
#include "common.cuh"

// `kind`: the same numbers as `Activation` on the Rust side.
enum { SILU = 0, QUICK_GELU = 1, GELU = 2, RELU = 3, SIGMOID = 4, TANH = 5 };

__device__ inline float activation(float x, int kind) {
    switch (kind) {
    case SILU: return silu(x);
    case QUICK_GELU: return quick_gelu(x);
    case GELU: return gelu(x);
    case RELU: return fmaxf(x, 0.0f);
    case SIGMOID: return sigmoid(x);
    default: return tanhf(x);
    }
}

__device__ inline float activation_slope(float x, int kind) {
    switch (kind) {
    case SILU: return silu_slope(x);
    case QUICK_GELU: return quick_gelu_slope(x);
    case GELU: return gelu_slope(x);
    case RELU: return x > 0.0f ? 1.0f : 0.0f;
    case SIGMOID: {
        float s = sigmoid(x);
        return s * (1.0f - s);
    }
    default: {
        float t = tanhf(x);
        return 1.0f - t * t;
    }
    }
}

// y = act(x), n elements. Any grid.
extern "C" __global__ void activate(const real* x, real* y, long long n, int kind) {
    map1(x, y, n, [=](float v) { return activation(v, kind); });
}

// dx = dy * act'(x), n elements. Any grid. dx may be dy.
extern "C" __global__ void activate_bwd(const real* x, const real* dy, real* dx, long long n, int kind) {
    map2(x, dy, dx, n, [=](float v, float d) { return d * activation_slope(v, kind); });
}

// GEGLU (Shazeer, arXiv 2002.05202): y = a * gelu(gate), where a row of x is [a, gate], each `cols` wide.
// n = rows * cols. Any grid.
extern "C" __global__ void geglu(const real* x, real* y, long long n, int cols) {
    for (long long i = thread_index(); i < n; i += thread_count()) {
        long long a = i + i / cols * cols;
        store(y + i, load(x + a) * gelu(load(x + a + cols)));
    }
}

// dx = [dy * gelu(gate), dy * a * gelu'(gate)]. n = rows * cols. Any grid.
extern "C" __global__ void geglu_bwd(const real* x, const real* dy, real* dx, long long n, int cols) {
    for (long long i = thread_index(); i < n; i += thread_count()) {
        long long a = i + i / cols * cols;
        float gate = load(x + a + cols), d = load(dy + i);
        float value = load(x + a);
        store(dx + a, d * gelu(gate));
        store(dx + a + cols, d * value * gelu_slope(gate));
    }
}

// y[i] = x[i] + bias[i / inner % channels]: inner 1 for rows, H * W for channels; with channels = B * C a bias of each
// sample's own. n elements. Any grid. y may be x.
extern "C" __global__ void add_bias(const real* x, const float* bias, real* y, long long n, int inner, int channels) {
    if (inner % 4 == 0 && n % 4 == 0 && is_aligned(x) && is_aligned(y)) {
        for (long long i = 4 * thread_index(); i < n; i += 4 * thread_count()) {
            float b = bias[i / inner % channels];
            Four a = load4(x + i);
            for (int k = 0; k < 4; ++k) a.v[k] += b;
            store4(y + i, a);
        }
        return;
    }
    for (long long i = thread_index(); i < n; i += thread_count()) {
        store(y + i, load(x + i) + bias[i / inner % channels]);
    }
}

// total[i] += part[i], f32 gradients. n elements. Any grid.
extern "C" __global__ void accumulate(const real* part, float* total, long long n) {
    for (long long i = thread_index(); i < n; i += thread_count()) total[i] += load(part + i);
}
