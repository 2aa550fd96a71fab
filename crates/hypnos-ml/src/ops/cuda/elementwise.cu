// Operations on each element: activations, GEGLU, bias.
#include "common.cuh"

// `kind`: the numbers of `Activation` on the Rust side.
enum { SILU = 0, GELU = 1, QUICK_GELU = 2 };

__device__ inline float activation(float x, int kind) {
    return kind == SILU ? silu(x) : kind == GELU ? gelu(x) : quick_gelu(x);
}

__device__ inline float activation_slope(float x, int kind) {
    return kind == SILU ? silu_slope(x) : kind == GELU ? gelu_slope(x) : quick_gelu_slope(x);
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

// y[i] = x[i] + bias[i / inner % channels] + more[i]: inner 1 for rows, H * W for channels. Either of bias and more may be
// null. n elements. Any grid. y may be x or more.
extern "C" __global__ void add_bias(const real* x, const float* bias, const real* more, real* y, long long n, int inner,
                                    int channels) {
    if (inner % 4 == 0 && n % 4 == 0 && is_aligned(x) && is_aligned(more) && is_aligned(y)) {
        for (long long i = 4 * thread_index(); i < n; i += 4 * thread_count()) {
            const float b = bias ? bias[i / inner % channels] : 0.0f;
            Four a = load4(x + i);
            for (int k = 0; k < 4; ++k) a.v[k] += b;
            if (more) {
                Four m = load4(more + i);
                for (int k = 0; k < 4; ++k) a.v[k] += m.v[k];
            }
            store4(y + i, a);
        }
        return;
    }
    for (long long i = thread_index(); i < n; i += thread_count()) {
        const float v = load(x + i) + (bias ? bias[i / inner % channels] : 0.0f);
        store(y + i, more ? v + load(more + i) : v);
    }
}
