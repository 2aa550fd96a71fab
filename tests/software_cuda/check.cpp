// Tests the software device. Our kernels, matrix products and convolutions must compute what plain loops in double do,
// in f32 and bf16, and gradients of convolutions must fit what the forward pass computes. Kernels and calls with a
// mistake made on purpose (planted.cu, barrierless.cu) must fail, and what they write to stderr must contain the words
// given here. Exits with 1 if any of this does not hold.
#include "check.h"

#include <cmath>

void check_attention();
void check_tensor_cores();

extern "C" {
int cublasGemmStridedBatchedEx(void*, int, int, int, int, int, const void*, const void*, int, int, long long,
                               const void*, int, int, long long, const void*, void*, int, int, long long, int, int,
                               int);
int cublasGemmEx(void*, int, int, int, int, int, const void*, const void*, int, int, const void*, int, int,
                 const void*, void*, int, int, int, int);
int cublasLtMatrixLayoutCreate(void**, int, uint64_t, uint64_t, int64_t);
int cublasLtMatmulDescCreate(void**, int, int);
int cublasLtMatmulDescSetAttribute(void*, int, const void*, size_t);
int cublasLtMatmulPreferenceCreate(void**);
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void*, int*);
int cublasLtMatmul(void*, void*, const void*, uint64_t, void*, uint64_t, void*, const void*, uint64_t, void*, uint64_t,
                   void*, const void*, void*, size_t, void*);
int cudnnCreateActivationDescriptor(void**);
int cudnnSetActivationDescriptor(void*, int, int, double);
int cudnnConvolutionBiasActivationForward(void*, const void*, void*, uint64_t, void*, uint64_t, void*, int, uint64_t,
                                          size_t, const void*, void*, uint64_t, void*, uint64_t, void*, void*,
                                          uint64_t);
int cudnnCreateTensorDescriptor(void**);
int cudnnCreateFilterDescriptor(void**);
int cudnnCreateConvolutionDescriptor(void**);
int cudnnSetTensor4dDescriptor(void*, int, int, int, int, int, int);
int cudnnSetFilter4dDescriptor(void*, int, int, int, int, int, int);
int cudnnSetConvolution2dDescriptor(void*, int, int, int, int, int, int, int, int);
int cudnnGetConvolutionForwardWorkspaceSize(void*, void*, void*, void*, void*, int, size_t*);
int cudnnConvolutionForward(void*, const void*, void*, uint64_t, void*, uint64_t, void*, int, uint64_t, size_t,
                            const void*, void*, uint64_t);
int cudnnConvolutionBackwardData(void*, const void*, void*, uint64_t, void*, uint64_t, void*, int, uint64_t, size_t,
                                 const void*, void*, uint64_t);
int cudnnConvolutionBackwardFilter(void*, const void*, void*, uint64_t, void*, uint64_t, void*, int, uint64_t, size_t,
                                   const void*, void*, uint64_t);
}

namespace {

struct Place {
    Type type;
    std::string module(const char* file) const { return file + std::string(type == Type::F32 ? "_f32" : "_bf16"); }
    double bound() const { return type == Type::F32 ? 2e-6 : 1e-2; }
};

void near(const std::string& what, const Buffer& got_in, const std::vector<double>& wanted, double bound) {
    Numbers got;
    if (!got_in.read(got)) return wrong(what + ": unreadable");
    double most = 1e-3;
    for (double v : wanted) most = std::max(most, std::fabs(v));
    for (size_t i = 0; i < wanted.size(); ++i) {
        if (!(std::fabs(got[i] - wanted[i]) <= bound * most)) {
            return wrong(what + ": element " + std::to_string(i) + " is " + std::to_string(got[i]) + ", wanted " +
                         std::to_string(wanted[i]));
        }
    }
}

void softmax(const Place& place) {
    const int rows = 5, cols = 203;
    const Numbers x = held(drawn(rows * cols, 1, 8), place.type);
    std::vector<double> wanted(x.size());
    for (int r = 0; r < rows; ++r) {
        double sum = 0;
        for (int c = 0; c < cols; ++c) sum += std::exp((double)x[r * cols + c]);
        for (int c = 0; c < cols; ++c) wanted[r * cols + c] = std::exp((double)x[r * cols + c]) / sum;
    }
    const Buffer in(x, place.type), out(x.size(), place.type);
    ran("softmax", launch(place.module("softmax"), "softmax", rows, 64, in, out, cols));
    near(place.module("softmax"), out, wanted, place.bound());
    ran("softmax in place", launch(place.module("softmax"), "softmax", rows, 64, in, in, cols));
    near(place.module("softmax in place"), in, wanted, place.bound());
}

void layer_norm(const Place& place) {
    const int rows = 7, cols = 322;
    const float eps = 1e-5f;
    const Numbers x = held(drawn(rows * cols, 2, 3), place.type), w = drawn(cols, 3), b = drawn(cols, 4);
    std::vector<double> wanted(x.size()), means(rows);
    for (int r = 0; r < rows; ++r) {
        double mean = 0, square = 0;
        for (int c = 0; c < cols; ++c) mean += x[r * cols + c] / (double)cols;
        for (int c = 0; c < cols; ++c) square += std::pow(x[r * cols + c] - mean, 2) / cols;
        for (int c = 0; c < cols; ++c) {
            wanted[r * cols + c] = (x[r * cols + c] - mean) / std::sqrt(square + eps) * w[c] + b[c];
        }
        means[r] = mean;
    }
    const Buffer in(x, place.type), weight(w), bias(b), out(x.size(), place.type), mean(rows), rstd(rows);
    ran("layer_norm",
        launch(place.module("norm"), "layer_norm", rows, 96, in, weight, bias, out, mean, rstd, cols, eps));
    near(place.module("layer_norm"), out, wanted, place.bound());
    near(place.module("layer_norm's mean"), mean, means, 1e-5);
}

void group_norm(const Place& place, int inner) {
    const int batch = 2, channels = 6, groups = 3, parts = 2, cuts = 2, with_silu = 1, pitch = channels + 2;
    const int len = channels / groups * inner;
    const float eps = 1e-6f;
    const Numbers x = held(drawn(batch * channels * inner, 5, 2), place.type), w = drawn(channels, 6);
    const Numbers shift = held(drawn(batch * pitch, 24), place.type);
    std::vector<double> wanted(x.size()), means(batch * groups);
    for (int g = 0; g < batch * groups; ++g) {
        double square = 0, &mean = means[g];
        const auto at = [&](int i) {
            return (double)x[i] + shift[i / inner / channels * pitch + i / inner % channels];
        };
        for (int i = g * len; i < (g + 1) * len; ++i) mean += at(i) / len;
        for (int i = g * len; i < (g + 1) * len; ++i) square += std::pow(at(i) - mean, 2) / len;
        for (int i = g * len; i < (g + 1) * len; ++i) {
            const double v = (at(i) - mean) / std::sqrt(square + eps) * w[i / inner % channels] + w[i / inner % channels];
            wanted[i] = v / (1 + std::exp(-v));
        }
    }
    const int all = batch * groups;
    const Buffer in(x, place.type), more(shift, place.type), weight(w), whole(x.size(), place.type),
        out(x.size(), place.type), part_means(all * parts), deviations(all * parts), mean(all), rstd(all);
    const std::string module = place.module("norm");
    ran("group_norm_whole", launch(module, "group_norm_whole", all, 32, in, more, pitch, weight, weight, whole, mean,
                                   rstd, channels, groups, inner, eps, with_silu));
    near(module + ": group_norm_whole", whole, wanted, place.bound());
    near(module + ": group_norm_whole's mean", mean, means, 1e-5);
    ran("group_norm_parts", launch(module, "group_norm_parts", all * parts, 32, in, more, pitch, part_means, deviations,
                                   len, inner, groups, parts));
    ran("group_norm",
        launch(module, "group_norm", batch * channels * cuts, 32, in, more, pitch, part_means, deviations, weight,
               weight, out, mean, rstd, channels, groups, inner, cuts, parts, eps, with_silu));
    near(module + ": group_norm", out, wanted, place.bound());
    near(module + ": group_norm's mean", mean, means, 1e-5);
}

void sums(const Place& place) {
    const int rows = 600, cols = 45, rows_per_part = 256, parts = 3;
    const Numbers x = held(drawn(rows * cols, 7), place.type);
    std::vector<double> wanted(cols), planes(rows);
    for (int i = 0; i < rows * cols; ++i) wanted[i % cols] += x[i], planes[i / cols] += x[i];
    const Buffer in(x, place.type), part_sums(parts * cols), out(cols), plane_sums(rows);
    ran("column_sum",
        launch(place.module("reduce"), "column_sum", parts * 2, 256, in, part_sums, rows, cols, rows_per_part));
    const int one_stack = 1;
    ran("sum_parts", launch("reduce_f32", "sum_parts", 1, 256, part_sums, out, one_stack, parts, cols));
    near(place.module("column_sum"), out, wanted, 1e-5);
    ran("plane_sum", launch(place.module("reduce"), "plane_sum", rows, 32, in, plane_sums, cols));
    near(place.module("plane_sum"), plane_sums, planes, 1e-5);
    const int images = 3, channels = rows / images;
    std::vector<double> of_channels(channels);
    for (int i = 0; i < rows; ++i) of_channels[i % channels] += planes[i];
    const Buffer channel_sums(channels);
    ran("channel_sum", launch(place.module("reduce"), "channel_sum", channels, 32, in, channel_sums, images, channels, cols));
    near(place.module("channel_sum"), channel_sums, of_channels, 1e-5);
}

void elementwise(const Place& place) {
    const long long n = 1027;
    const int gelu = 1, inner = 1, channels = 79, cols = 13;
    const Numbers x = held(drawn(2 * n, 8, 4), place.type), b = drawn(channels, 9);
    std::vector<double> active(n), biased(n), gated(n);
    const auto gelu_of = [](double v) { return v * std::erfc(-v * M_SQRT1_2) / 2; };
    for (int i = 0; i < n; ++i) {
        active[i] = gelu_of(x[i]);
        biased[i] = (double)x[i] + b[i % channels] + x[n + i];
        const int a = i + i / cols * cols;
        gated[i] = x[a] * gelu_of(x[a + cols]);
    }
    const Buffer in(x, place.type), more(Numbers(x.begin() + n, x.end()), place.type), bias(b), out(n, place.type);
    const std::string module = place.module("elementwise");
    ran("activate", launch(module, "activate", 3, 256, in, out, n, gelu));
    near(module + ": activate", out, active, place.bound());
    ran("add_bias", launch(module, "add_bias", 3, 256, in, bias, more, out, n, inner, channels));
    near(module + ": add_bias", out, biased, place.bound());
    ran("geglu", launch(module, "geglu", 3, 256, in, out, n, cols));
    near(module + ": geglu", out, gated, place.bound());
}

void upsample(const Place& place) {
    const int h = 3, w = 5, out_h = 6, out_w = 10, planes = 4;
    const long long n = planes * out_h * out_w;
    const Numbers x = held(drawn(planes * h * w, 10), place.type);
    std::vector<double> wanted(n);
    for (int i = 0; i < n; ++i) {
        wanted[i] = x[(i / out_w / out_h * h + i / out_w % out_h / 2) * w + i % out_w / 2];
    }
    const Buffer in(x, place.type), out(n, place.type);
    ran("upsample", launch(place.module("spatial"), "upsample", 1, 256, in, out, n, h, w, out_h, out_w));
    near(place.module("upsample"), out, wanted, 0);
}

void embedding(const Place& place) {
    const int rows = 9, cols = 40, tokens = 5;
    const Numbers table = held(drawn(rows * cols, 15), place.type), grad = held(drawn(tokens * cols, 16), place.type);
    const unsigned ids[tokens] = {3, 8, 3, 0, 3};
    std::vector<double> wanted(tokens * cols), sums(rows * cols);
    for (int i = 0; i < tokens * cols; ++i) {
        wanted[i] = table[ids[i / cols] * cols + i % cols];
        sums[ids[i / cols] * cols + i % cols] += grad[i];
    }
    const Buffer in(table, place.type), out(tokens * cols, place.type), dy(grad, place.type), id_buffer(tokens),
        d_table(Numbers(rows * cols, 0.0f));
    cuMemcpyHtoD_v2(id_buffer.address, ids, sizeof ids);
    const std::string module = place.module("embedding");
    ran("embedding", launch(module, "embedding", tokens, 32, in, id_buffer, out, cols));
    near(module, out, wanted, 0);
    ran("embedding_bwd", launch(module, "embedding_bwd", tokens, 64, dy, id_buffer, d_table, tokens, cols));
    near(module + "_bwd", d_table, sums, 1e-6);
}

// AdamW's first step: both moments begin at 0.
void adamw(const Place& place) {
    const int n = 70000, chunk = 65536; // two chunks
    const float clip = 0.5f, beta1 = 0.9f, beta2 = 0.99f, rate = 0.1f, correction = 10, eps = 1e-8f, keep = 0.98f;
    const Numbers values = drawn(n, 17), grads = held(drawn(n, 18), place.type);
    std::vector<double> wanted(n), squares(2);
    for (int i = 0; i < n; ++i) {
        const double g = (double)grads[i] * clip, m = (1 - (double)beta1) * g, v = (1 - (double)beta2) * g * g;
        wanted[i] = values[i] * (double)keep - rate * m / (std::sqrt(v) * correction + eps);
        squares[i / chunk] += (double)grads[i] * grads[i];
    }
    const Buffer value(values), mean(Numbers(n, 0.0f)), variance(Numbers(n, 0.0f)), grad(grads, place.type), sums(2);
    const Buffer narrow(n, Type::BF16);
    const uint64_t slot[] = {value.address, mean.address,   variance.address,
                             grad.address,  narrow.address, uint64_t(n)};
    const int chunks[] = {0, 0, 0, 1};
    const Buffer slots(sizeof slot / 4), chunk_table(4);
    cuMemcpyHtoD_v2(slots.address, slot, sizeof slot);
    cuMemcpyHtoD_v2(chunk_table.address, chunks, sizeof chunks);
    const std::string module = place.module("adamw");
    ran("sum_squares", launch(module, "sum_squares", 2, 512, slots, chunk_table, sums));
    near(module + ": sum_squares", sums, squares, 1e-5);
    ran("adamw", launch(module, "adamw", 2, 512, slots, chunk_table, clip, beta1, beta2, rate, correction, eps, keep));
    near(module, value, wanted, 1e-5);
    near(module + ": the copy in bf16", narrow, wanted, 1e-2);
}

struct Dot {
    double value = 0, size = 0; // the product, and that of the lengths
};
Dot dot(const Buffer& a, const Numbers& b) {
    Numbers values;
    if (!a.read(values)) return {NAN, NAN};
    double sum = 0, aa = 0, bb = 0;
    for (size_t i = 0; i < b.size(); ++i) {
        sum += (double)values[i] * b[i], aa += (double)values[i] * values[i], bb += (double)b[i] * b[i];
    }
    return {sum, std::sqrt(aa * bb)};
}

// A convolution is linear in its input and in its weight, so <dy, y> = <dx, x> = <dw, w>.
void adjoint(const std::string& what, Dot y, Dot x, Dot w, const Place& place) {
    const double bound = place.type == Type::F32 ? 1e-6 : 4e-3;
    if (!(std::fabs(x.value - y.value) <= bound * x.size)) wrong(what + ": gradient of the input");
    if (!(std::fabs(w.value - y.value) <= bound * w.size)) wrong(what + ": gradient of the weight");
}

struct Window {
    int h, w, out_h, out_w, k_h, k_w, stride, pad_top, pad_left, dilation;
};
const Window WINDOW = {7, 6, 4, 3, 3, 3, 2, 1, 1, 1};

void depthwise(const Place& place) {
    const int batch = 2, channels = 3, planes = batch * channels;
    const long long n_in = planes * 42, n_out = planes * 12;
    const Numbers x = held(drawn(n_in, 19), place.type), w = drawn(channels * 9, 20);
    const Numbers dy = held(Numbers(n_out, 1.0f), place.type);
    const Buffer in(x, place.type), weight(w), grad(dy, place.type), out(n_out, place.type), dx(n_in, place.type),
        dw(channels * 9);
    const std::string module = place.module("spatial");
    ran("depthwise", launch(module, "depthwise", 1, 256, in, weight, out, n_out, channels, WINDOW));
    ran("depthwise_bwd", launch(module, "depthwise_bwd", 1, 256, grad, weight, dx, n_in, channels, WINDOW));
    ran("depthwise_bwd_weight",
        launch(module, "depthwise_bwd_weight", channels * 9, 32, in, grad, dw, batch, channels, WINDOW));
    adjoint(place.module("depthwise"), dot(out, dy), dot(dx, x), dot(dw, w), place);
}

// cuDNN's descriptors of a convolution with WINDOW.
struct Descriptors {
    void *x, *y, *w, *conv;

    Descriptors(Type of, int batch, int channels, int outs) {
        const Window s = WINDOW;
        const int type = of == Type::F32 ? 0 : 9;
        cudnnCreateTensorDescriptor(&x), cudnnCreateTensorDescriptor(&y), cudnnCreateFilterDescriptor(&w);
        cudnnCreateConvolutionDescriptor(&conv);
        cudnnSetTensor4dDescriptor(x, 0, type, batch, channels, s.h, s.w);
        cudnnSetTensor4dDescriptor(y, 0, type, batch, outs, s.out_h, s.out_w);
        cudnnSetFilter4dDescriptor(w, type, 0, outs, channels, s.k_h, s.k_w);
        cudnnSetConvolution2dDescriptor(conv, s.pad_top, s.pad_left, s.stride, s.stride, s.dilation, s.dilation, 1, 0);
    }
};

void convolution(const Place& place) {
    const int batch = 2, channels = 3, outs = 4, algorithm = 1;
    const Window s = WINDOW;
    const auto [tx, ty, tw, conv] = Descriptors(place.type, batch, channels, outs);
    size_t bytes;
    ran("workspace", cudnnGetConvolutionForwardWorkspaceSize(nullptr, tx, tw, conv, ty, algorithm, &bytes));
    const Numbers x = held(drawn(batch * channels * 42, 21), place.type),
                  w = held(drawn(outs * channels * 9, 22), place.type);
    const Numbers dy = held(drawn(batch * outs * 12, 23), place.type);
    std::vector<double> wanted(dy.size());
    for (size_t i = 0; i < wanted.size(); ++i) {
        const int ox = i % s.out_w, oy = i / s.out_w % s.out_h, o = i / 12 % outs, b = i / 12 / outs;
        for (int tap = 0; tap < channels * 9; ++tap) {
            const int iy = oy * 2 - 1 + tap / 3 % 3, ix = ox * 2 - 1 + tap % 3;
            if (iy < 0 || iy >= s.h || ix < 0 || ix >= s.w) continue;
            wanted[i] += (double)w[o * channels * 9 + tap] * x[((b * channels + tap / 9) * s.h + iy) * s.w + ix];
        }
    }
    const Buffer in(x, place.type), weight(w, place.type), grad(dy, place.type), out(dy.size(), place.type),
        plus(dy.size(), place.type), dx(x.size(), place.type), dw(w.size(), place.type), space(bytes);
    const float one = 1, zero = 0;
    ran("convolution", cudnnConvolutionForward(nullptr, &one, tx, in.address, tw, weight.address, conv, algorithm,
                                               space.address, bytes, &zero, ty, out.address));
    near(place.module("convolution"), out, wanted, place.bound());
    void *identity, *tb;
    cudnnCreateActivationDescriptor(&identity), cudnnSetActivationDescriptor(identity, 5, 1, 0);
    cudnnCreateTensorDescriptor(&tb), cudnnSetTensor4dDescriptor(tb, 0, place.type == Type::F32 ? 0 : 9, 1, outs, 1, 1);
    const Numbers b = held(drawn(outs, 25), place.type);
    const Buffer bias(b, place.type);
    ran("convolution with more",
        cudnnConvolutionBiasActivationForward(nullptr, &one, tx, in.address, tw, weight.address, conv, algorithm,
                                              space.address, bytes, &one, ty, grad.address, tb, bias.address, identity,
                                              ty, plus.address));
    for (size_t i = 0; i < wanted.size(); ++i) wanted[i] += (double)b[i / 12 % outs] + dy[i];
    near(place.module("convolution with more"), plus, wanted, place.bound());
    ran("convolution's input", cudnnConvolutionBackwardData(nullptr, &one, tw, weight.address, ty, grad.address, conv,
                                                            algorithm, space.address, bytes, &zero, tx, dx.address));
    ran("convolution's weight", cudnnConvolutionBackwardFilter(nullptr, &one, tx, in.address, ty, grad.address, conv,
                                                               algorithm, space.address, bytes, &zero, tw, dw.address));
    adjoint(place.module("convolution"), dot(out, dy), dot(dx, x), dot(dw, w), place);
}

// c = a b, all stored by columns. The columns of `a` begin `pitch_a` elements apart: with pitch_a > m it is part of a
// larger matrix, as one head of an attention is.
int product(const Buffer& a, const Buffer& b, const Buffer& c, int m, int n, int k, int pitch_a) {
    const float one = 1, zero = 0;
    const int type = a.type == Type::F32 ? 0 : 14;
    return cublasGemmStridedBatchedEx(nullptr, 0, 0, m, n, k, &one, (void*)a.address, type, pitch_a, 0,
                                      (void*)b.address, type, k, 0, &zero, (void*)c.address, 0, m, 0, 1, 68, 0);
}

void products(const Place& place) {
    const int m = 5, n = 7, k = 130, pitch = 9;
    const Numbers a = held(drawn(pitch * k, 11), place.type), b = held(drawn(k * n, 12), place.type);
    std::vector<double> wanted(m * n);
    for (int i = 0; i < m; ++i) {
        for (int j = 0; j < n; ++j) {
            for (int p = 0; p < k; ++p) wanted[i + j * m] += (double)a[i + p * pitch] * b[p + j * k];
        }
    }
    const Buffer left(a, place.type), right(b, place.type), to(m * n);
    ran("product", product(left, right, to, m, n, k, pitch));
    near(place.module("product"), to, wanted, 2e-6);
}

// A product of a transposed matrix, with a bias and another matrix added.
void products_with_more(const Place& place) {
    const int m = 5, n = 7, k = 66, type = place.type == Type::F32 ? 0 : 14, transposed = 1, with_bias = 4;
    const Numbers a = held(drawn(k * m, 26), place.type), b = held(drawn(k * n, 27), place.type),
                  c = held(drawn(m * n, 28), place.type), v = held(drawn(m, 29), place.type);
    std::vector<double> wanted(m * n);
    for (int i = 0; i < m * n; ++i) {
        wanted[i] = (double)c[i] + v[i % m];
        for (int p = 0; p < k; ++p) wanted[i] += (double)a[p + i % m * k] * b[p + i / m * k];
    }
    const Buffer left(a, place.type), right(b, place.type), more(c, place.type), bias(v, place.type),
        to(m * n, place.type), space(256);
    void *la, *lb, *lc, *described, *preference;
    cublasLtMatrixLayoutCreate(&la, type, k, m, k), cublasLtMatrixLayoutCreate(&lb, type, k, n, k);
    cublasLtMatrixLayoutCreate(&lc, type, m, n, m), cublasLtMatmulDescCreate(&described, 68, 0);
    cublasLtMatmulDescSetAttribute(described, 3, &transposed, 4);
    cublasLtMatmulDescSetAttribute(described, 7, &with_bias, 4);
    cublasLtMatmulDescSetAttribute(described, 8, &bias.address, 8);
    cublasLtMatmulPreferenceCreate(&preference);
    uint64_t found[12];
    int n_found;
    ran("an algorithm",
        cublasLtMatmulAlgoGetHeuristic(nullptr, described, la, lb, lc, lc, preference, 1, found, &n_found));
    const float one = 1;
    ran("product with more",
        cublasLtMatmul(nullptr, described, &one, left.address, la, right.address, lb, &one, more.address, lc,
                       to.address, lc, found, (void*)space.address, 1024, nullptr));
    near(place.module("product with more"), to, wanted, place.bound());
}

void barrierless() {
    const int rows = 8, cols = 256, parts = 2, size = 64, groups = 8, no_silu = 0, no_pitch = 0, one_image = 1;
    const float eps = 1e-5f;
    const Buffer x(drawn(rows * cols, 13)), y(rows * cols), w(drawn(cols, 14)), sums(cols), others(cols);
    const auto kernel = [&](const char* name, unsigned blocks, unsigned threads, const auto&... arguments) {
        found(name, "shared memory", [&] { return launch("barrierless", name, blocks, threads, arguments...); });
    };
    kernel("softmax", rows, 64, x, y, cols);
    kernel("layer_norm", rows, 64, x, w, w, y, sums, others, cols, eps);
    const uint64_t no_shift = 0;
    kernel("group_norm_parts", rows * parts, 64, x, no_shift, no_pitch, sums, others, cols, cols, groups, parts);
    kernel("group_norm_whole", rows, 64, x, no_shift, no_pitch, w, w, y, sums, others, groups, groups, cols, eps,
           no_silu);
    kernel("plane_sum", rows, 64, x, sums, cols);
    kernel("channel_sum", rows, 64, x, sums, one_image, rows, cols);
    kernel("column_sum", 2, 256, x, y, rows, size, rows);
    // One parameter of 256 elements. A moment is 256 bytes, any of which are valid codes, and a scale.
    const int n = 256, chunk[] = {0, 0};
    const float one = 1;
    const Buffer values(drawn(512, 24)), value(drawn(n, 25)), grad(drawn(n, 26)), scales(Numbers(2, one)),
        mean(drawn(n / 4, 27)), variance(drawn(n / 4, 28)), slots(16), chunks(2);
    const uint64_t no_copy = 0, slot[] = {value.address,      mean.address, variance.address, scales.address,
                                          scales.address + 4, grad.address, no_copy,          uint64_t(n)};
    cuMemcpyHtoD_v2(slots.address, slot, sizeof slot);
    cuMemcpyHtoD_v2(chunks.address, chunk, sizeof chunk);
    kernel("adamw_8bit", 1, 64, slots, chunks, values, one, one, one, one, one, eps, one);
}

void planted() {
    const Numbers ones(64, 1.0f);
    const Buffer x(ones), y(64), fresh(64);
    const int n = 64, rows = 4, cols = 16, too_long = 20, yes = 1, no = 0, rounds = 3;
    const auto kernel = [&](const char* name, unsigned blocks, unsigned threads, const auto&... arguments) {
        return launch("planted", name, blocks, threads, arguments...);
    };
    found("a race in shared memory", "without a barrier in between",
          [&] { return kernel("race_in_shared", 1, 64, x, y); });
    found("a race in a warp", "without a barrier in between",
          [&] { return kernel("race_in_a_warp", 1, 32, x, y, no); });
    ran("a warp with its barrier", kernel("race_in_a_warp", 1, 32, x, y, yes));
    // Several times, each time in another order of the threads: it must be found in all.
    for (int time = 0; time < 8; ++time) {
        found("a race of warps", "without a barrier in between", [&] { return kernel("race_of_warps", 1, 64, x, y); });
    }
    found("a race of blocks", "without a barrier in between", [&] { return kernel("race_of_blocks", 8, 32, x, x); });
    found("a race of rounds", "without a barrier in between",
          [&] { return kernel("race_of_rounds", 1, 64, y, rounds, no); });
    ran("rounds with their barrier", kernel("race_of_rounds", 1, 64, y, rounds, yes));
    found("an overrun", "0 bytes behind an allocation of 256, which are not allocated, at planted.cu:", [&] {
        return kernel("overrun", 1, 32, x, y, n);
    });
    ran("the right stride", kernel("transpose", 1, 32, x, y, rows, cols, cols));
    found("a wrong stride", "which are not allocated",
          [&] { return kernel("transpose", 1, 32, x, y, rows, cols, too_long); });
    found("an output with gaps", "were never written", [&] {
        Numbers read;
        ran("gaps", kernel("gaps", 1, 32, x, fresh, n));
        return fresh.read(read) ? 0 : 1;
    });
    found("unwritten shared memory", "which this block has not written",
          [&] { return kernel("unwritten_shared", 1, 32, y); });
    found("two barriers at once", "wait at the barriers of lines",
          [&] { return kernel("barrier_for_some", 1, 64, y); });
    found("a shuffle without some", "of which only 0xffff come", [&] { return kernel("shuffle_for_some", 1, 32, y); });
    found("a shuffle with two masks", "while others wait with mask",
          [&] { return kernel("shuffle_with_two_masks", 1, 32, y); });
    found("a shuffle in two places", "while others wait with mask",
          [&] { return kernel("shuffle_in_two_places", 1, 32, y); });
    found("a misaligned read", "not a multiple of 8", [&] { return kernel("misaligned", 1, 1, x, y); });
    found("freed memory", "which are not allocated", [&] {
        uint64_t gone;
        cuMemAlloc_v2(&gone, 256);
        cuMemFree_v2(gone);
        return kernel("freed", 1, 32, gone, y);
    });
    found("unwritten memory", "which were never written, at planted.cu:",
          [&] { return kernel("freed", 1, 32, Buffer(64), y); });
    found("a product with a wrong stride", "which end too soon", [&] { return product(x, x, y, 4, 4, 16, 5); });
    found("a single product with a wrong stride", "cublasGemmEx: reads", [&] {
        const float one = 1, zero = 0;
        const auto at = [](const Buffer& buffer) { return (void*)buffer.address; };
        return cublasGemmEx(nullptr, 0, 0, 4, 4, 16, &one, at(x), 0, 5, at(x), 0, 16, &zero, at(y), 0, 4, 68, 0);
    });
    found("a product of unwritten numbers", "were never written",
          [&] { return product(Buffer(64), x, y, 4, 4, 16, 4); });
    const Descriptors shapes(Type::F32, 1, 1, 1);
    const Buffer image(Numbers(42, 1.0f)), weight(Numbers(9, 1.0f)), result(12);
    const auto convolve = [&](const Buffer& from, const Buffer& to) {
        const float one = 1, zero = 0;
        return cudnnConvolutionForward(nullptr, &one, shapes.x, from.address, shapes.w, weight.address, shapes.conv, 0,
                                       0, 0, &zero, shapes.y, to.address);
    };
    ran("a convolution within its operands", convolve(image, result));
    found("a convolution with too short an input", "which end too soon",
          [&] { return convolve(Buffer(Numbers(41, 1.0f)), result); });
    found("a convolution with too short an output", "which end too soon", [&] { return convolve(image, Buffer(11)); });
    dynamic_bytes = 64 * sizeof(float);
    const int one_more = 65;
    ran("memory of the launch's size", kernel("dynamic_overrun", 1, 32, x, y, n));
    found("an overrun of the launch's shared memory", "which end too soon",
          [&] { return kernel("dynamic_overrun", 1, 32, x, y, one_more); });
    dynamic_bytes = 64 << 10;
    found("too much shared memory", "are too many", [&] { return kernel("dynamic_overrun", 1, 32, x, y, n); });
    dynamic_bytes = 0;
    barrierless();
    // Our own kernel, with a count that is one too high.
    const long long beyond = 65;
    const int silu = 0;
    found("our kernel's overrun", "not allocated",
          [&] { return launch("elementwise_f32", "activate", 1, 256, x, y, beyond, silu); });
}

} // namespace

int main() {
    for (const Place& place : {Place{Type::F32}, Place{Type::BF16}}) {
        softmax(place);
        layer_norm(place);
        group_norm(place, 35);
        group_norm(place, 36); // four at once
        sums(place);
        elementwise(place);
        upsample(place);
        embedding(place);
        adamw(place);
        depthwise(place);
        convolution(place);
        products(place);
        products_with_more(place);
    }
    check_tensor_cores();
    check_attention();
    planted();
    printf("%s\n", failures ? "the software device is not sound" : "the software device is sound");
    return failures != 0;
}
