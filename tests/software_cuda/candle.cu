// The kernels of candle's CUDA backend that we meet, written anew by their names and arguments: what comes from
// candle's PTX is run by these. One that is missing is named on stderr when it is asked for.
//
// An operation without a fixed layout gets `info`: the sizes of each dimension, then the strides of each input, or
// nothing where all are contiguous.
#include "device.h"

namespace {

struct Bf16 {
    unsigned short bits;
    Bf16() = default;
    Bf16(float v) {
        const unsigned u = __float_as_uint(v);
        bits = v != v ? 0x7fc0 : (unsigned short)((u + 0x7fff + (u >> 16 & 1)) >> 16); // to nearest, ties to even
    }
    operator float() const { return __uint_as_float(unsigned(bits) << 16); }
};

// What T is computed in.
template <class T> struct Wide {
    using type = T;
};
template <> struct Wide<Bf16> {
    using type = float;
};
template <class T> using wide = typename Wide<T>::type;

size_t index() { return (size_t)blockIdx.x * blockDim.x + threadIdx.x; }
size_t count() { return (size_t)gridDim.x * blockDim.x; }

// Where element `i` of an input lies: the strides are number `which` behind the sizes. Not reported: candle's sizes
// would be most of all that is read.
[[gnu::no_sanitize("thread")]] size_t place(size_t i, size_t dims, const size_t* info, int which) {
    if (!info) return i;
    size_t at = 0;
    for (size_t d = dims; d-- > 0;) {
        at += i % info[d] * info[dims * (which + 1) + d];
        i /= info[d];
    }
    return at;
}

template <class S, class T> void cast(size_t n, size_t dims, const size_t* info, const S* x, T* y) {
    for (size_t i = index(); i < n; i += count()) y[i] = T(wide<S>(x[place(i, dims, info, 0)]));
}

template <class T> void affine(size_t n, size_t dims, const size_t* info, const T* x, T* y, T mul, T add) {
    for (size_t i = index(); i < n; i += count()) {
        y[i] = T(T(wide<T>(x[place(i, dims, info, 0)]) * wide<T>(mul)) + wide<T>(add));
    }
}

template <class T, auto F> void unary(size_t n, size_t dims, const size_t* info, const T* x, T* y) {
    for (size_t i = index(); i < n; i += count()) y[i] = T(F(wide<T>(x[place(i, dims, info, 0)])));
}

template <class T> void powf_(size_t n, size_t dims, const size_t* info, T exponent, const T* x, T* y) {
    for (size_t i = index(); i < n; i += count()) {
        y[i] = T(std::pow(wide<T>(x[place(i, dims, info, 0)]), wide<T>(exponent)));
    }
}

template <class T> void elu(size_t n, size_t dims, const size_t* info, T alpha, const T* x, T* y) {
    for (size_t i = index(); i < n; i += count()) {
        const wide<T> v = x[place(i, dims, info, 0)];
        y[i] = T(v > 0 ? v : wide<T>(alpha) * (std::exp(v) - 1));
    }
}

template <class T, class R, auto F>
void binary(size_t n, size_t dims, const size_t* info, const T* x, const T* y, R* z) {
    for (size_t i = index(); i < n; i += count()) {
        z[i] = R(F(wide<T>(x[place(i, dims, info, 0)]), wide<T>(y[place(i, dims, info, 1)])));
    }
}

template <class T, class I>
void where(size_t n, size_t dims, const size_t* info, const I* which, const T* yes, const T* no, T* y) {
    for (size_t i = index(); i < n; i += count()) {
        y[i] = which[place(i, dims, info, 0)] ? yes[place(i, dims, info, 1)] : no[place(i, dims, info, 2)];
    }
}

template <class T> void fill(T* y, T value, size_t n) {
    for (size_t i = index(); i < n; i += count()) y[i] = value;
}

template <class T> void const_set(size_t n, size_t dims, const size_t* info, T value, T* y) {
    for (size_t i = index(); i < n; i += count()) y[place(i, dims, info, 0)] = value;
}

template <class T> void copy2d(const T* x, T* y, uint32_t rows, uint32_t cols, uint32_t row_of_x, uint32_t row_of_y) {
    for (size_t i = index(); i < (size_t)rows * cols; i += count()) {
        y[i / cols * row_of_y + i % cols] = x[i / cols * row_of_x + i % cols];
    }
}

// One block, or one thread if the run is short, for each result.
template <class T, auto F> void reduce(size_t, size_t run, size_t dims, const size_t* info, const T* x, T* y) {
    if (threadIdx.x != 0) return;
    wide<T> r = x[place(blockIdx.x * run, dims, info, 0)];
    for (size_t i = 1; i < run; ++i) r = F(r, wide<T>(x[place(blockIdx.x * run + i, dims, info, 0)]));
    y[blockIdx.x] = T(r);
}
template <class T> void sum_small(size_t n, size_t run, size_t dims, const size_t* info, const T* x, T* y) {
    const size_t at = index();
    if (at >= n) return;
    wide<T> r = 0;
    for (size_t i = 0; i < run; ++i) r += wide<T>(x[place(at * run + i, dims, info, 0)]);
    y[at] = T(r);
}

// y[l, j, r] = x[l, ids[j], r]
template <class T, class I>
void index_select(size_t n, size_t, const size_t*, const I* ids, const T* x, T* y, size_t, size_t rows, size_t n_ids,
                  size_t right) {
    for (size_t i = index(); i < n; i += count()) {
        y[i] = x[(i / (n_ids * right) * rows + ids[i / right % n_ids]) * right + i % right];
    }
}

// y[l, ids[j], r] += x[l, j, r]
template <class T, class I>
void index_add(const I* ids, size_t n_ids, const T* x, T* y, size_t left, size_t, size_t rows, size_t right) {
    for (size_t i = index(); i < left * right; i += count()) {
        for (size_t j = 0; j < n_ids; ++j) {
            T& to = y[(i / right * rows + ids[j]) * right + i % right];
            to = T(wide<T>(to) + wide<T>(x[(i / right * n_ids + j) * right + i % right]));
        }
    }
}

// y[l, j, r] = x[l, ids[l, j, r], r]
template <class T, class I>
void gather(size_t n, const I* ids, const T* x, T* y, size_t, size_t rows, size_t n_ids, size_t right) {
    for (size_t i = index(); i < n; i += count()) {
        y[i] = x[(i / (n_ids * right) * rows + ids[i]) * right + i % right];
    }
}

// [B, C, H, W] with any strides; candle calls the rows its width.
template <class T, bool MAX>
void pool(size_t, size_t k_h, size_t k_w, size_t step_h, size_t step_w, const size_t* info, const T* x, T* y) {
    const size_t h = (info[2] - k_h) / step_h + 1, w = (info[3] - k_w) / step_w + 1, i = index();
    if (i >= info[0] * info[1] * h * w) return;
    const T* plane = x + i / (h * w * info[1]) * info[4] + i / (h * w) % info[1] * info[5];
    wide<T> r = 0;
    for (size_t dy = 0; dy < k_h; ++dy) {
        for (size_t dx = 0; dx < k_w; ++dx) {
            const wide<T> v = plane[(i / w % h * step_h + dy) * info[6] + (i % w * step_w + dx) * info[7]];
            r = !MAX ? r + v : dy + dx == 0 || v > r ? v : r;
        }
    }
    y[i] = T(MAX ? r : r / (k_h * k_w));
}

template <class T>
void upsample_nearest(size_t h, size_t w, double scale_h, double scale_w, const size_t* info, const T* x, T* y) {
    const size_t i = index();
    if (i >= info[0] * info[1] * h * w) return;
    const T* plane = x + i / (h * w * info[1]) * info[4] + i / (h * w) % info[1] * info[5];
    size_t from_y = i / w % h * scale_h, from_x = i % w * scale_w;
    from_y = from_y < info[2] ? from_y : info[2] - 1, from_x = from_x < info[3] ? from_x : info[3] - 1;
    y[i] = plane[from_y * info[6] + from_x * info[7]];
}

// One function of each name, for every type.
#define UNARY(name, value) \
    struct name { \
        template <class T> static T of(T x) { return value; } \
    };
#define BINARY(name, value) \
    struct name { \
        template <class T> static auto of(T x, T y) { return value; } \
    };
UNARY(Copy, x)
UNARY(Neg, -x)
UNARY(Recip, 1 / x)
UNARY(Exp, std::exp(x))
UNARY(Log, std::log(x))
UNARY(Sin, std::sin(x))
UNARY(Cos, std::cos(x))
UNARY(Tanh, std::tanh(x))
UNARY(Erf, std::erf(x))
UNARY(Abs, std::fabs(x))
UNARY(Sqr, x * x)
UNARY(Sqrt, std::sqrt(x))
UNARY(Relu, x > 0 ? x : 0)
UNARY(Silu, x / (1 + std::exp(-x)))
UNARY(Sigmoid, 1 / (1 + std::exp(-x)))
UNARY(GeluErf, x * std::erfc(-x * T(M_SQRT1_2)) / 2)
UNARY(Ceil, std::ceil(x))
UNARY(Floor, std::floor(x))
UNARY(Round, std::round(x))
UNARY(Sign, T((x > 0) - (x < 0)))
BINARY(Add, T(x + y))
BINARY(Sub, T(x - y))
BINARY(Mul, T(x * y))
BINARY(Div, T(x / y))
BINARY(Max, x > y ? x : y)
BINARY(Min, x < y ? x : y)
BINARY(Eq, x == y)
BINARY(Ne, x != y)
BINARY(Lt, x < y)
BINARY(Le, x <= y)
BINARY(Gt, x > y)
BINARY(Ge, x >= y)

} // namespace

#define K(name, ...) SoftwareCall<&__VA_ARGS__>::entry(name)
#define U(name, T, s, F) K(name "_" s, unary<T, &F::of<wide<T>>>)
#define B(name, T, R, s, F) K(name "_" s, binary<T, R, &F::of<wide<T>>>)
#define FOR_FLOATS(T, s) \
    U("uneg", T, s, Neg), U("urecip", T, s, Recip), U("uexp", T, s, Exp), U("ulog", T, s, Log), U("usin", T, s, Sin), \
        U("ucos", T, s, Cos), U("utanh", T, s, Tanh), U("uerf", T, s, Erf), U("uabs", T, s, Abs), \
        U("usqr", T, s, Sqr), U("usqrt", T, s, Sqrt), U("urelu", T, s, Relu), U("usilu", T, s, Silu), \
        U("usigmoid", T, s, Sigmoid), U("ugelu_erf", T, s, GeluErf), U("uceil", T, s, Ceil), U("ufloor", T, s, Floor), \
        U("uround", T, s, Round), U("usign", T, s, Sign), K("upowf_" s, powf_<T>), K("uelu_" s, elu<T>), \
        K("affine_" s, affine<T>), K("avg_pool2d_" s, pool<T, false>), K("max_pool2d_" s, pool<T, true>), \
        K("upsample_nearest2d_" s, upsample_nearest<T>)
#define FOR_ALL(T, s) \
    U("ucopy", T, s, Copy), B("badd", T, T, s, Add), B("bsub", T, T, s, Sub), B("bmul", T, T, s, Mul), \
        B("bdiv", T, T, s, Div), B("bmaximum", T, T, s, Max), B("bminimum", T, T, s, Min), B("eq", T, uint8_t, s, Eq), \
        B("ne", T, uint8_t, s, Ne), B("lt", T, uint8_t, s, Lt), B("le", T, uint8_t, s, Le), \
        B("gt", T, uint8_t, s, Gt), B("ge", T, uint8_t, s, Ge), K("cast_" s "_f32", cast<T, float>), \
        K("cast_" s "_bf16", cast<T, Bf16>), K("cast_" s "_f64", cast<T, double>), \
        K("cast_" s "_u8", cast<T, uint8_t>), K("cast_" s "_u32", cast<T, uint32_t>), \
        K("cast_" s "_i64", cast<T, int64_t>), K("where_u8_" s, where<T, uint8_t>), \
        K("where_u32_" s, where<T, uint32_t>), K("fill_" s, fill<T>), K("const_set_" s, const_set<T>), \
        K("copy2d_" s, copy2d<T>), K("fast_sum_" s, reduce<T, &Add::of<wide<T>>>), \
        K("fast_max_" s, reduce<T, &Max::of<wide<T>>>), K("fast_min_" s, reduce<T, &Min::of<wide<T>>>), \
        K("fast_sum_small_" s, sum_small<T>), K("is_u32_" s, index_select<T, uint32_t>), \
        K("ia_u32_" s, index_add<T, uint32_t>), K("gather_u32_" s, gather<T, uint32_t>), \
        K("is_i64_" s, index_select<T, int64_t>), K("ia_i64_" s, index_add<T, int64_t>), \
        K("gather_i64_" s, gather<T, int64_t>)

extern "C" const SoftwareKernel software_cuda_kernels[];
const SoftwareKernel software_cuda_kernels[] = {
    FOR_FLOATS(float, "f32"),  FOR_FLOATS(Bf16, "bf16"),
    FOR_FLOATS(double, "f64"), FOR_ALL(float, "f32"),
    FOR_ALL(Bf16, "bf16"),     FOR_ALL(double, "f64"),
    FOR_ALL(uint8_t, "u8"),    FOR_ALL(uint32_t, "u32"),
    FOR_ALL(int64_t, "i64"),   {},
};
