// cuDNN as we call it: two-dimensional convolutions of f32 or bf16 in NCHW, forward and both ways back, with sums in
// f32. They are products with unfolded patches; TENSOR_OP_MATH rounds f32 factors to TF32. The algorithms we name ask
// for scratch memory as the real ones may, and every byte of it is written.
#include "numbers.h"
#include "runtime.h"

#include <cstdio>

using namespace software;

namespace {

enum Status { SUCCESS = 0, BAD_PARAM = 2000, NOT_SUPPORTED = 3000, EXECUTION_FAILED = 5000 };
enum { FLOAT = 0, BFLOAT16 = 9, NCHW = 0, CROSS_CORRELATION = 1, IDENTITY = 5, IMPLICIT_PRECOMP_GEMM = 1 };
enum { TENSOR_OP_MATH = 1, FMA_MATH = 3 };

struct Tensor { // or filter
    int type, dims[4];
    size_t len() const { return (size_t)dims[0] * dims[1] * dims[2] * dims[3]; }
    Type stored() const { return type == FLOAT ? Type::F32 : Type::BF16; }
    size_t bytes() const { return len() * size_of(stored()); }
};
struct Convolution {
    int pad[2], step[2], dilation[2], groups = 1, math = FMA_MATH;

    // A factor as it is multiplied.
    std::vector<float> factor(std::vector<float> values) const {
        if (math == TENSOR_OP_MATH) round_to_tf32(values);
        return values;
    }
};

struct Activation {
    int mode = -1;
};

int handle_value;

int unsupported(const char* what, int value, const char* wanted) {
    fprintf(stderr, "software CUDA: cuDNN: %s %d; wanted is %s\n", what, value, wanted);
    return NOT_SUPPORTED;
}

int set(Tensor* tensor, int format, int type, int a, int b, int c, int d) {
    if (format != NCHW) return unsupported("tensor format", format, "0 (NCHW)");
    if (type != FLOAT && type != BFLOAT16) return unsupported("data type", type, "0 (f32) or 9 (bf16)");
    if (a < 1 || b < 1 || c < 1 || d < 1) {
        fprintf(stderr, "software CUDA: cuDNN: a tensor of %d x %d x %d x %d; wanted are sizes of at least 1\n", a, b,
                c, d);
        return BAD_PARAM;
    }
    *tensor = {type, {a, b, c, d}};
    return SUCCESS;
}

std::string described(const Tensor& tensor) {
    const int* d = tensor.dims;
    char text[64];
    snprintf(text, sizeof text, "%d x %d x %d x %d of type %d", d[0], d[1], d[2], d[3], tensor.type);
    return text;
}

// Whether x, w and y belong together. Says so if not.
bool agree(const char* what, const Tensor& x, const Tensor& w, const Tensor& y, const Convolution& conv) {
    bool same = x.type == w.type && w.type == y.type && x.dims[0] == y.dims[0] && w.dims[0] == y.dims[1] &&
                w.dims[1] * conv.groups == x.dims[1] && w.dims[0] % conv.groups == 0;
    for (int d = 0; d < 2; ++d) {
        const int window = conv.dilation[d] * (w.dims[2 + d] - 1) + 1;
        same = same && (x.dims[2 + d] + 2 * conv.pad[d] - window) / conv.step[d] + 1 == y.dims[2 + d];
    }
    if (!same) {
        fprintf(stderr,
                "software CUDA: %s: x (%s), w (%s) and y (%s) do not agree with a padding of %d x %d, a stride of %d x "
                "%d, a dilation of %d x %d and %d groups\n",
                what, described(x).c_str(), described(w).c_str(), described(y).c_str(), conv.pad[0], conv.pad[1],
                conv.step[0], conv.step[1], conv.dilation[0], conv.dilation[1], conv.groups);
    }
    return same;
}

// Some scratch for all but the algorithms of number 0, so that its size and place are exercised.
size_t scratch(const Tensor& x, int algorithm) { return algorithm == 0 ? 0 : 1024 + x.dims[1] * 64; }

// One image's patches, [C k_h k_w, H' W'] of one group, and back.
struct Patches {
    const Tensor &x, &w, &y;
    const Convolution& conv;

    size_t rows() const { return (size_t)w.dims[1] * w.dims[2] * w.dims[3]; }
    size_t places() const { return (size_t)y.dims[2] * y.dims[3]; }
    size_t outs() const { return w.dims[0] / conv.groups; }
    size_t image(int n, int group) const {
        return ((size_t)n * x.dims[1] + (size_t)group * w.dims[1]) * x.dims[2] * x.dims[3];
    }
    size_t result(int n, int group) const { return ((size_t)n * y.dims[1] + group * outs()) * places(); }

    // f(place in the patches, place in the image of the group), for those inside the image.
    template <class F> void each(F f) const {
        size_t at = 0;
        for (int c = 0; c < w.dims[1]; ++c) {
            for (int ky = 0; ky < w.dims[2]; ++ky) {
                for (int kx = 0; kx < w.dims[3]; ++kx) {
                    for (int oy = 0; oy < y.dims[2]; ++oy) {
                        const int iy = oy * conv.step[0] - conv.pad[0] + ky * conv.dilation[0];
                        for (int ox = 0; ox < y.dims[3]; ++ox, ++at) {
                            const int ix = ox * conv.step[1] - conv.pad[1] + kx * conv.dilation[1];
                            if (iy < 0 || iy >= x.dims[2] || ix < 0 || ix >= x.dims[3]) continue;
                            f(at, ((size_t)c * x.dims[2] + iy) * x.dims[3] + ix);
                        }
                    }
                }
            }
        }
    }
    void gather(const void* data, int n, int group, std::vector<float>& to) const {
        to.assign(rows() * places(), 0.0f);
        const size_t from = image(n, group);
        each([&](size_t at, size_t pixel) { to[at] = load(data, from + pixel, x.stored()); });
        if (conv.math == TENSOR_OP_MATH) round_to_tf32(to);
    }
};

std::vector<float> loaded(const void* data, size_t from, size_t n, Type type) {
    std::vector<float> r(n);
    for (size_t i = 0; i < n; ++i) r[i] = load(data, from + i, type);
    return r;
}

// [cols, rows] of [rows, cols].
std::vector<float> transposed(const std::vector<float>& a, size_t rows, size_t cols) {
    std::vector<float> r(a.size());
    for (size_t i = 0; i < rows; ++i) {
        for (size_t j = 0; j < cols; ++j) r[j * rows + i] = a[i * cols + j];
    }
    return r;
}

struct Scale {
    float alpha, beta;
    Scale(const void* a, const void* b) : alpha(*(const float*)a), beta(*(const float*)b) {}
    void put(void* data, size_t at, Type type, float v) const {
        store(data, at, type, alpha * v + (beta != 0 ? beta * load(data, at, type) : 0.0f));
    }
};

// put(place in y, value) for every value of the convolution.
template <class Put>
void convolve(const Tensor& x, const void* px, const Tensor& w, const void* pw, const Convolution& conv,
              const Tensor& y, Put put) {
    const Patches patches = {x, w, y, conv};
    const size_t rows = patches.rows(), places = patches.places(), outs = patches.outs();
    std::vector<float> columns, result;
    for (int group = 0; group < conv.groups; ++group) {
        const auto weight = conv.factor(loaded(pw, group * outs * rows, outs * rows, w.stored()));
        for (int n = 0; n < x.dims[0]; ++n) {
            patches.gather(px, n, group, columns);
            result.assign(outs * places, 0.0f);
            multiply(weight.data(), columns.data(), result.data(), outs, places, rows);
            const size_t at = patches.result(n, group);
            for (size_t i = 0; i < result.size(); ++i) put(at + i, result[i]);
        }
    }
}

// What every call checks: shapes, operands and scratch memory.
int ready(const char* what, const Tensor& a, const void* pa, const Tensor& b, const void* pb, const Tensor& to,
          void* pto, const Scale& scale, void* space, size_t bytes, size_t wanted, bool agreeing) {
    begin(what);
    if (!agreeing) return BAD_PARAM;
    if (bytes < wanted) {
        fprintf(stderr, "software CUDA: %s: %zu bytes of scratch memory, %zu are wanted\n", what, bytes, wanted);
        return BAD_PARAM;
    }
    const bool fine = check(pa, a.bytes(), READ) && check(pb, b.bytes(), READ) && check(space, wanted, WRITE) &&
                      (scale.beta == 0 || check(pto, to.bytes(), READ)) && check(pto, to.bytes(), WRITE);
    if (fine && wanted && !recording()) memset(space, 0xff, wanted);
    return fine ? SUCCESS : EXECUTION_FAILED;
}

} // namespace

extern "C" {
size_t cudnnGetVersion() { return 92801; }
int cudnnCreate(void** handle) { return *handle = &handle_value, SUCCESS; }
int cudnnDestroy(void*) { return SUCCESS; }
int cudnnSetStream(void*, void*) { return SUCCESS; }
int cudnnCreateTensorDescriptor(Tensor** tensor) { return *tensor = new Tensor(), SUCCESS; }
int cudnnDestroyTensorDescriptor(Tensor* tensor) { return delete tensor, SUCCESS; }
int cudnnCreateFilterDescriptor(Tensor** filter) { return *filter = new Tensor(), SUCCESS; }
int cudnnDestroyFilterDescriptor(Tensor* filter) { return delete filter, SUCCESS; }
int cudnnCreateConvolutionDescriptor(Convolution** conv) { return *conv = new Convolution(), SUCCESS; }
int cudnnDestroyConvolutionDescriptor(Convolution* conv) { return delete conv, SUCCESS; }
int cudnnCreateActivationDescriptor(Activation** activation) { return *activation = new Activation(), SUCCESS; }
int cudnnDestroyActivationDescriptor(Activation* activation) { return delete activation, SUCCESS; }
int cudnnSetActivationDescriptor(Activation* activation, int mode, int, double) {
    return activation->mode = mode, SUCCESS;
}
int cudnnSetTensor4dDescriptor(Tensor* tensor, int format, int type, int n, int c, int h, int w) {
    return set(tensor, format, type, n, c, h, w);
}
int cudnnSetFilter4dDescriptor(Tensor* filter, int type, int format, int k, int c, int h, int w) {
    return set(filter, format, type, k, c, h, w);
}
int cudnnSetConvolution2dDescriptor(Convolution* conv, int pad_h, int pad_w, int step_h, int step_w, int dilation_h,
                                    int dilation_w, int mode, int type) {
    if (mode != CROSS_CORRELATION) return unsupported("convolution mode", mode, "1 (cross-correlation)");
    if (type != FLOAT) return unsupported("computing type", type, "0 (f32)");
    *conv = {{pad_h, pad_w}, {step_h, step_w}, {dilation_h, dilation_w}};
    return SUCCESS;
}
int cudnnSetConvolutionMathType(Convolution* conv, int math) {
    if (math != TENSOR_OP_MATH && math != FMA_MATH) return unsupported("math type", math, "1 (tensor cores) or 3 (FMA)");
    return conv->math = math, SUCCESS;
}
int cudnnSetConvolutionGroupCount(Convolution* conv, int groups) { return conv->groups = groups, SUCCESS; }

int cudnnGetConvolutionForwardWorkspaceSize(void*, Tensor* x, Tensor* w, Convolution* conv, Tensor* y, int algorithm,
                                            size_t* bytes) {
    *bytes = scratch(*x, algorithm);
    return agree("cudnnGetConvolutionForwardWorkspaceSize", *x, *w, *y, *conv) ? SUCCESS : BAD_PARAM;
}
int cudnnGetConvolutionBackwardDataWorkspaceSize(void*, Tensor* w, Tensor* dy, Convolution* conv, Tensor* dx,
                                                 int algorithm, size_t* bytes) {
    *bytes = scratch(*dx, algorithm);
    return agree("cudnnGetConvolutionBackwardDataWorkspaceSize", *dx, *w, *dy, *conv) ? SUCCESS : BAD_PARAM;
}
int cudnnGetConvolutionBackwardFilterWorkspaceSize(void*, Tensor* x, Tensor* dy, Convolution* conv, Tensor* dw,
                                                   int algorithm, size_t* bytes) {
    *bytes = scratch(*x, algorithm);
    return agree("cudnnGetConvolutionBackwardFilterWorkspaceSize", *x, *dw, *dy, *conv) ? SUCCESS : BAD_PARAM;
}

int cudnnConvolutionForward(void*, const void* alpha, Tensor* x, const void* px, Tensor* w, const void* pw,
                            Convolution* conv, int algorithm, void* space, size_t bytes, const void* beta, Tensor* y,
                            void* py) {
    Lock lock;
    const Scale scale(alpha, beta);
    const char* what = "cudnnConvolutionForward";
    const int status = ready(what, *x, px, *w, pw, *y, py, scale, space, bytes, scratch(*x, algorithm),
                             agree(what, *x, *w, *y, *conv));
    if (status != SUCCESS || recording()) return status;
    convolve(*x, px, *w, pw, *conv, *y, [&](size_t at, float v) { scale.put(py, at, y->stored(), v); });
    return SUCCESS;
}

// y = alpha conv(x) + share z + bias.
int cudnnConvolutionBiasActivationForward(void*, const void* alpha, Tensor* x, const void* px, Tensor* w,
                                          const void* pw, Convolution* conv, int algorithm, void* space, size_t bytes,
                                          const void* share_, Tensor* z, const void* pz, Tensor* bias,
                                          const void* pbias, Activation* activation, Tensor* y, void* py) {
    Lock lock;
    const float nothing = 0, share = *(const float*)share_;
    const Scale scale(alpha, &nothing);
    const char* what = "cudnnConvolutionBiasActivationForward";
    if (activation->mode != IDENTITY) return unsupported("activation", activation->mode, "5 (identity)");
    if (algorithm != IMPLICIT_PRECOMP_GEMM)
        return unsupported("algorithm", algorithm, "1 (implicit and precomputed), which alone has the identity");
    const bool added = z->type == y->type && z->len() == y->len() && bias->type == y->type &&
                       bias->dims[1] == y->dims[1] && (int)bias->len() == y->dims[1];
    if (!added) {
        fprintf(stderr, "software CUDA: %s: z (%s) and bias (%s) cannot be added to y (%s)\n", what,
                described(*z).c_str(), described(*bias).c_str(), described(*y).c_str());
    }
    const int status = ready(what, *x, px, *w, pw, *y, py, scale, space, bytes, scratch(*x, algorithm),
                             added && agree(what, *x, *w, *y, *conv));
    if (status != SUCCESS) return status;
    if (!check(pbias, bias->bytes(), READ) || (share != 0 && !check(pz, z->bytes(), READ))) return EXECUTION_FAILED;
    if (recording()) return SUCCESS;
    const size_t places = (size_t)y->dims[2] * y->dims[3];
    convolve(*x, px, *w, pw, *conv, *y, [&](size_t at, float v) {
        v = scale.alpha * v + load(pbias, at / places % y->dims[1], y->stored());
        store(py, at, y->stored(), share != 0 ? v + share * load(pz, at, y->stored()) : v);
    });
    return SUCCESS;
}

int cudnnConvolutionBackwardData(void*, const void* alpha, Tensor* w, const void* pw, Tensor* dy, const void* pdy,
                                 Convolution* conv, int algorithm, void* space, size_t bytes, const void* beta,
                                 Tensor* dx, void* pdx) {
    Lock lock;
    const Scale scale(alpha, beta);
    const char* what = "cudnnConvolutionBackwardData";
    const int status = ready(what, *w, pw, *dy, pdy, *dx, pdx, scale, space, bytes, scratch(*dx, algorithm),
                             agree(what, *dx, *w, *dy, *conv));
    if (status != SUCCESS || recording()) return status;
    const Patches patches = {*dx, *w, *dy, *conv};
    const size_t rows = patches.rows(), places = patches.places(), outs = patches.outs();
    std::vector<float> columns, sums((size_t)w->dims[1] * dx->dims[2] * dx->dims[3]);
    for (int group = 0; group < conv->groups; ++group) {
        const auto factor = conv->factor(loaded(pw, group * outs * rows, outs * rows, w->stored()));
        const auto weight = transposed(factor, outs, rows);
        for (int n = 0; n < dx->dims[0]; ++n) {
            const auto grad = conv->factor(loaded(pdy, patches.result(n, group), outs * places, dy->stored()));
            columns.assign(rows * places, 0.0f);
            multiply(weight.data(), grad.data(), columns.data(), rows, places, outs);
            std::fill(sums.begin(), sums.end(), 0.0f);
            patches.each([&](size_t at, size_t pixel) { sums[pixel] += columns[at]; });
            const size_t to = patches.image(n, group);
            for (size_t i = 0; i < sums.size(); ++i) scale.put(pdx, to + i, dx->stored(), sums[i]);
        }
    }
    return SUCCESS;
}

int cudnnConvolutionBackwardFilter(void*, const void* alpha, Tensor* x, const void* px, Tensor* dy, const void* pdy,
                                   Convolution* conv, int algorithm, void* space, size_t bytes, const void* beta,
                                   Tensor* dw, void* pdw) {
    Lock lock;
    const Scale scale(alpha, beta);
    const char* what = "cudnnConvolutionBackwardFilter";
    const int status = ready(what, *x, px, *dy, pdy, *dw, pdw, scale, space, bytes, scratch(*x, algorithm),
                             agree(what, *x, *dw, *dy, *conv));
    if (status != SUCCESS || recording()) return status;
    const Patches patches = {*x, *dw, *dy, *conv};
    const size_t rows = patches.rows(), places = patches.places(), outs = patches.outs();
    std::vector<float> columns, sums;
    for (int group = 0; group < conv->groups; ++group) {
        sums.assign(outs * rows, 0.0f);
        for (int n = 0; n < x->dims[0]; ++n) {
            patches.gather(px, n, group, columns);
            const auto grad = conv->factor(loaded(pdy, patches.result(n, group), outs * places, dy->stored()));
            multiply(grad.data(), transposed(columns, rows, places).data(), sums.data(), outs, rows, places);
        }
        for (size_t i = 0; i < sums.size(); ++i) scale.put(pdw, group * sums.size() + i, dw->stored(), sums[i]);
    }
    return SUCCESS;
}
}
