// Checks the fused attention against loops in double, forward and backward, each number by the error that rounding to
// bf16 can cause in it, and that mistakes in it are found.
#include "check.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>

namespace {

// As in attention.cu.
struct Layout {
    long long batch;
    int token, head;
};
struct Attention {
    int batch, heads, queries, keys, causal;
    float scale;
    Layout q, k, v, out, d_out, d_q, d_k, d_v;
};

// How a kernel is launched, by the width of a head.
struct Kernel {
    unsigned rows, threads, shared_bytes;
};
struct Kernels {
    Kernel forward, backward_queries, backward_keys, few_keys; // the last for few keys alone, if there is one
};
constexpr unsigned MOST_SHARED = 99 << 10; // of GPUs with compute capability 8.6, 8.9 and 12.0
unsigned tiles(unsigned rows, unsigned width) { return 4 * rows * (width / 8 % 2 ? width : width + 8) * 2; }
unsigned with_numbers(unsigned rows, unsigned width) { return tiles(rows, width) + 4 * rows * 4; }
unsigned parts(unsigned queries, unsigned keys, unsigned parts) { return 4 * queries * keys * parts; }
Kernels kernels_of(int width) {
    switch (width) {
    case 40:
        return {{128, 128, tiles(64, 40)},
                {128, 128, tiles(64, 40)},
                {128, 128, with_numbers(64, 40)},
                {16, 128, with_numbers(128, 40)}};
    case 64:
        return {{128, 128, tiles(64, 64)},
                {64, 128, tiles(64, 64)},
                {64, 128, with_numbers(64, 64)},
                {16, 128, with_numbers(64, 64)}};
    case 80:
        return {{64, 128, tiles(64, 80)},
                {64, 128, tiles(64, 80)},
                {64, 128, with_numbers(64, 80)},
                {16, 128, with_numbers(64, 80)}};
    case 160:
        return {{64, 128, tiles(32, 160)},
                {64, 128, tiles(32, 160)},
                {32, 64, with_numbers(16, 160) + tiles(16, 160)},
                {}};
    case 512:
        return {{64, 256, tiles(16, 512) + parts(64, 16, 2)},
                {32, 256, tiles(16, 512) + 2 * parts(32, 16, 4)},
                {32, 256, with_numbers(16, 512) + 2 * parts(16, 32, 4)},
                {}};
    }
    abort();
}

enum Storage { TOKENS_FIRST, HEADS_FIRST, ONE_PRODUCT };
struct Case {
    int batch, heads, queries, keys, causal;
    Storage storage;
    float away = 0; // how far queries and keys lie on opposite sides of 0
};
const Case CASES[] = {
    {1, 1, 1, 1, 0, TOKENS_FIRST},   {2, 2, 7, 77, 0, TOKENS_FIRST},     {1, 2, 130, 77, 0, HEADS_FIRST},
    {1, 2, 77, 77, 1, ONE_PRODUCT},  {1, 1, 130, 130, 0, ONE_PRODUCT},   {1, 1, 130, 130, 1, TOKENS_FIRST},
    {1, 1, 33, 200, 1, HEADS_FIRST}, {1, 1, 200, 33, 1, TOKENS_FIRST},   {1, 1, 7, 77, 0, TOKENS_FIRST, 4},
};

// [batch, tokens, heads, width] of a buffer, and the place in it of a number.
struct Tensor {
    size_t offset;
    Layout layout;
    size_t at(int b, int token, int head, int c) const {
        return offset + b * layout.batch + (size_t)token * layout.token + (size_t)head * layout.head + c;
    }
};
Tensor tensor_of(const Case& c, int tokens, int width, int which) {
    const int row = c.heads * width;
    switch (c.storage) {
    case HEADS_FIRST: return {0, {(long long)tokens * row, width, tokens * width}};
    case ONE_PRODUCT: return {(size_t)which * row, {3ll * tokens * row, 3 * row, width}};
    default: return {0, {(long long)tokens * row, row, width}};
    }
}

// What should come out, and how far off each number may be.
struct Wanted {
    std::vector<double> value, bound;
    Wanted(size_t n) : value(n), bound(n) {}
};

// bf16 keeps 8 bits of a number, rounded to nearest. A sum of 40 to 512 products in f32 is off by F32 of the sum of
// their sizes at most, and an exponential by as much of itself as its exponent is off. SECOND_ORDER is for what is
// rounded twice.
const double BF16 = 1.0 / 256, F32 = 2e-6, SECOND_ORDER = 1.01;

// One head of one picture. The probabilities p and the gradients ds of the scores are rounded before they are
// multiplied, and so are the results. delta is the sum of d_out * out with the rounded out.
struct Head {
    int queries, keys, width;
    double scale;
    bool causal;
    std::vector<double> q, k, v, d_out, p, ds;
    std::vector<double> ds_bound;
    double f32 = F32; // what sums in f32 make of a probability
    Wanted out, d_q, d_k, d_v, log_sum_exp;

    Head(int queries, int keys, int width, double scale, bool causal)
        : queries(queries), keys(keys), width(width), scale(scale), causal(causal), q(queries * width),
          k(keys * width), v(keys * width), d_out(queries * width), p(queries * keys), ds(queries * keys),
          ds_bound(queries * keys), out(queries * width), d_q(queries * width), d_k(keys * width), d_v(keys * width),
          log_sum_exp(queries) {}

    double dot(const std::vector<double>& a, int i, const std::vector<double>& b, int j) const {
        double sum = 0;
        for (int c = 0; c < width; ++c) sum += a[i * width + c] * b[j * width + c];
        return sum;
    }

    // to += factor * row j of `of`, and what that may be off if factor is off by `off`.
    void add(Wanted& to, int i, double factor, double off, const std::vector<double>& of, int j) const {
        for (int c = 0; c < width; ++c) {
            to.value[i * width + c] += factor * of[j * width + c];
            to.bound[i * width + c] += off * std::fabs(of[j * width + c]);
        }
    }

    static void round(Wanted& w) {
        for (size_t i = 0; i < w.value.size(); ++i) {
            w.bound[i] = SECOND_ORDER * (w.bound[i] + BF16 * std::fabs(w.value[i])) + 1e-30;
        }
    }

    void forward() {
        for (int i = 0; i < queries; ++i) {
            for (int j = 0; j < keys; ++j) {
                double size = 1;
                for (int c = 0; c < width; ++c) size += scale * std::fabs(q[i * width + c] * k[j * width + c]);
                f32 = std::max(f32, F32 * size);
            }
        }
        for (int i = 0; i < queries; ++i) {
            const int seen = causal ? std::min(keys, i + 1) : keys;
            double sum = 0;
            for (int j = 0; j < seen; ++j) sum += p[i * keys + j] = std::exp(scale * dot(q, i, k, j));
            for (int j = 0; j < seen; ++j) {
                p[i * keys + j] /= sum;
                add(out, i, p[i * keys + j], (BF16 + f32) * p[i * keys + j], v, j);
            }
            log_sum_exp.value[i] = std::log(sum);
            log_sum_exp.bound[i] = f32;
        }
        round(out);
    }

    void backward() {
        for (int i = 0; i < queries; ++i) {
            double delta = 0, off = 0;
            for (int c = 0; c < width; ++c) {
                delta += d_out[i * width + c] * out.value[i * width + c];
                off += std::fabs(d_out[i * width + c]) * out.bound[i * width + c];
            }
            for (int j = 0; j < keys; ++j) {
                const double dp = dot(d_out, i, v, j), at = p[i * keys + j];
                ds[i * keys + j] = at * (dp - delta);
                ds_bound[i * keys + j] = at * (off + f32 * (std::fabs(dp) + std::fabs(delta))) +
                                         BF16 * std::fabs(ds[i * keys + j]);
            }
        }
        for (int i = 0; i < queries; ++i) {
            for (int j = 0; j < keys; ++j) {
                const double d = scale * ds[i * keys + j], off = scale * ds_bound[i * keys + j];
                add(d_q, i, d, off, k, j);
                add(d_k, j, d, off, q, i);
                add(d_v, j, p[i * keys + j], (BF16 + f32) * p[i * keys + j], d_out, i);
            }
        }
        round(d_q), round(d_k), round(d_v);
    }
};

// The largest error, and the largest relative to its bound.
struct Errors {
    double most = 0, of_bound = 0;
    void note(double got, double wanted, double bound) {
        const double error = std::fabs(got - wanted);
        most = std::max(most, error);
        of_bound = std::max(of_bound, std::isfinite(error) ? error / bound : INFINITY);
    }
    void join(const Errors& other) {
        most = std::max(most, other.most), of_bound = std::max(of_bound, other.of_bound);
    }
};
using Table = std::map<std::string, Errors>;

// An attention on the device. Where all are parts of one product, q, k and v share a buffer, and so do their gradients.
struct Device {
    const Case c;
    const int width;
    std::string module;
    Attention sizes;
    std::array<Tensor, 4> tensors; // q, k, v, out
    std::array<Numbers, 4> values; // the fourth is d_out
    std::vector<Buffer*> inputs, grads;
    Buffer out, log_sum_exp, delta;

    static size_t size(const Case& c, int tokens, int width) { return (size_t)c.batch * tokens * c.heads * width; }

    Device(const Case& c, int width)
        : c(c), width(width), module("attention_bf16"), out(size(c, c.queries, width), Type::BF16),
          log_sum_exp(c.batch * c.heads * c.queries), delta(c.batch * c.heads * c.queries) {
        const bool one = c.storage == ONE_PRODUCT;
        Case plain = c;
        if (one) plain.storage = TOKENS_FIRST;
        for (int which = 0; which < 4; ++which) {
            const int tokens = which == 1 || which == 2 ? c.keys : c.queries;
            tensors[which] = tensor_of(which == 3 ? plain : c, tokens, width, which);
            values[which] = held(drawn(size(c, tokens, width) * (one && which == 0 ? 3 : 1), 51 + which,
                                       which == 0 ? 4 : which == 1 ? 2 : 1),
                                 Type::BF16);
        }
        for (float& v : values[0]) v += c.away;
        for (float& v : values[1]) v -= c.away;
        for (int which : {0, 1}) values[which] = held(values[which], Type::BF16);
        if (one) values[1] = values[2] = values[0];
        for (int which = 0; which < 4; ++which) {
            inputs.push_back(one && (which == 1 || which == 2) ? inputs[0] : new Buffer(values[which], Type::BF16));
            if (which == 3) break;
            grads.push_back(one && which > 0 ? grads[0] : new Buffer(values[which].size(), Type::BF16));
        }
        const auto layout = [&](int which) { return tensors[which].layout; };
        sizes = {c.batch,   c.heads,   c.queries, c.keys,    c.causal,  1 / std::sqrt((float)width),
                 layout(0), layout(1), layout(2), layout(3), layout(3), layout(0),
                 layout(1), layout(2)};
    }
    ~Device() {
        inputs.resize(c.storage == ONE_PRODUCT ? 4 : inputs.size());
        std::sort(inputs.begin(), inputs.end()), std::sort(grads.begin(), grads.end());
        inputs.erase(std::unique(inputs.begin(), inputs.end()), inputs.end());
        grads.erase(std::unique(grads.begin(), grads.end()), grads.end());
        for (Buffer* buffer : inputs) delete buffer;
        for (Buffer* buffer : grads) delete buffer;
    }

    uint64_t address(const std::vector<Buffer*>& of, int which) const {
        return of[which]->address + 2 * tensors[which].offset;
    }

    template <class... T> int run(const char* name, const Kernel& kernel, int rows, const T&... arguments) {
        const unsigned blocks = c.batch * c.heads * ((rows + kernel.rows - 1) / kernel.rows);
        const std::string whole = name + std::to_string(width);
        dynamic_bytes = kernel.shared_bytes;
        if (dynamic_bytes > MOST_SHARED) wrong(whole + " takes too much shared memory");
        cuFuncSetAttribute(function_of(module, whole.c_str()), 8, MOST_SHARED);
        const int status = launch(module, whole.c_str(), blocks, kernel.threads, arguments...);
        dynamic_bytes = 0;
        return status;
    }
    int forward() {
        const uint64_t q = address(inputs, 0), k = address(inputs, 1), v = address(inputs, 2);
        return run("attention_forward_", kernels_of(width).forward, c.queries, q, k, v, out, log_sum_exp, sizes);
    }
    int deltas() {
        const unsigned blocks = (c.batch * c.heads * c.queries + 31) / 32;
        return launch(module, "attention_delta", blocks, 256, out, *inputs[3], delta, sizes, width);
    }
    int backward_queries() {
        const uint64_t q = address(inputs, 0), k = address(inputs, 1), v = address(inputs, 2), d = address(grads, 0);
        return run("attention_backward_queries_", kernels_of(width).backward_queries, c.queries, q, k, v, *inputs[3],
                   log_sum_exp, delta, d, sizes);
    }
    int of_keys(const char* name, const Kernel& kernel) {
        const uint64_t q = address(inputs, 0), k = address(inputs, 1), v = address(inputs, 2);
        const uint64_t d_k = address(grads, 1), d_v = address(grads, 2);
        return run(name, kernel, c.keys, q, k, v, *inputs[3], log_sum_exp, delta, d_k, d_v, sizes);
    }
    int backward_keys() { return of_keys("attention_backward_keys_", kernels_of(width).backward_keys); }
    int few_keys() { return of_keys("attention_backward_few_keys_", kernels_of(width).few_keys); }
    int all() {
        for (const auto& step : {&Device::forward, &Device::deltas, &Device::backward_queries, &Device::backward_keys})
            if (int status = (this->*step)()) return status;
        return 0;
    }

    // So that nothing of what was is taken for a result.
    void clear_grads() {
        for (int which = 0; which < 3; ++which) {
            const std::vector<uint16_t> nothing(grads[which]->n, 0x7fc0);
            cuMemcpyHtoD_v2(grads[which]->address, nothing.data(), 2 * nothing.size());
        }
    }

    std::vector<Numbers> results() {
        std::vector<Numbers> all(5);
        bool fine = out.read(all[0]) && log_sum_exp.read(all[4]);
        for (int which = 0; which < 3; ++which) fine = grads[which]->read(all[1 + which]) && fine;
        if (!fine) wrong("attention's results are unreadable");
        return all;
    }

    void take(std::vector<double>& to, int which, int b, int head, int tokens) const {
        for (int i = 0; i < tokens * width; ++i) {
            to[i] = values[which][tensors[which].at(b, i / width, head, i % width)];
        }
    }
    void compare(Table& table, const std::string& name, const Numbers& got, const Wanted& wanted, const Tensor& tensor,
                 int b, int head) const {
        Errors errors;
        for (size_t i = 0; i < wanted.value.size(); ++i) {
            errors.note(got[tensor.at(b, i / width, head, i % width)], wanted.value[i], wanted.bound[i]);
        }
        table[name].join(errors);
    }
    Table errors() {
        Table table;
        const std::vector<Numbers> got = results();
        for (int b = 0; b < c.batch; ++b) {
            for (int h = 0; h < c.heads; ++h) {
                Head head(c.queries, c.keys, width, sizes.scale, c.causal);
                take(head.q, 0, b, h, c.queries), take(head.k, 1, b, h, c.keys), take(head.v, 2, b, h, c.keys);
                take(head.d_out, 3, b, h, c.queries);
                head.forward();
                head.backward();
                compare(table, "out", got[0], head.out, tensors[3], b, h);
                compare(table, "d_q", got[1], head.d_q, tensors[0], b, h);
                compare(table, "d_k", got[2], head.d_k, tensors[1], b, h);
                compare(table, "d_v", got[3], head.d_v, tensors[2], b, h);
                for (int i = 0; i < c.queries; ++i) {
                    table["log_sum_exp"].note(got[4][(b * c.heads + h) * c.queries + i], head.log_sum_exp.value[i],
                                              head.log_sum_exp.bound[i]);
                }
            }
        }
        return table;
    }
};

void comparisons(int width) {
    Table table;
    for (const Case& c : CASES) {
        if (width == 512 && c.queries + c.keys > 210) continue; // these take long and have no more kinds of tiles
        Device device(c, width);
        const std::string what = "attention of width " + std::to_string(width) + ", case " +
                                 std::to_string(&c - CASES);
        const auto compared = [&](const std::string& what) {
            for (const auto& [name, errors] : device.errors()) {
                if (!(errors.of_bound <= 1)) {
                    wrong(what + ": " + name + " is " + std::to_string(errors.of_bound) + " of its bound off");
                }
                table[name].join(errors);
            }
        };
        ran(what, device.all());
        compared(what);
        if (kernels_of(width).few_keys.rows == 0) continue;
        device.clear_grads();
        ran(what + ", few keys", device.few_keys());
        ran(what + ", queries", device.backward_queries());
        compared(what + ", few keys");
    }
    printf("attention of width %d: largest error, and part of the bound:", width);
    for (const auto& [name, errors] : table) printf(" %s %.1e %.2f", name.c_str(), errors.most, errors.of_bound);
    printf("\n");
}

// The order of blocks and threads is another in each launch.
void same_bits() {
    Device device({2, 2, 130, 77, 0, TOKENS_FIRST}, 40);
    ran("attention", device.all());
    const std::vector<Numbers> first = device.results();
    ran("attention again", device.all());
    if (device.results() != first) wrong("attention gives other bits the second time");
}

// The kernels with one line changed, by the build script.
void mistakes() {
    Device device({1, 2, 130, 150, 0, TOKENS_FIRST}, 40), causal({1, 1, 130, 150, 1, TOKENS_FIRST}, 40);
    Device wide({1, 1, 20, 20, 0, TOKENS_FIRST}, 512);
    ran("attention", device.all());
    ran("attention", wide.all());
    for (const auto& step : {&Device::forward, &Device::backward_queries, &Device::backward_keys}) {
        const auto noticed = [&](const char* what, const char* words, const char* module) {
            device.module = module;
            found(what, words, [&] { return (device.*step)(); });
        };
        noticed("attention without barriers", "shared memory", "attention_barrierless");
        noticed("attention that does not wait for its copies", "has not written", "attention_waitless");
        wide.module = "attention_hasty_sums";
        found("attention without the barriers of its sums", "shared memory", [&] { return (wide.*step)(); });
        if (step == &Device::backward_keys) {
            device.module = "attention_hasty_splits";
            found("attention without the barriers of its splits", "shared memory", [&] { return device.few_keys(); });
        }
        noticed("attention that copies to the tile it works on", "shared memory", "attention_one_stage");
    }
    // Launches that run, with results that are too far off.
    Device far({1, 1, 7, 77, 0, TOKENS_FIRST, 4}, 40); // what keys that do not exist would add is not a number here
    const auto too_far = [](const char* module, Device& device, int (Device::*step)()) {
        device.module = "attention_bf16";
        ran("attention", device.all());
        device.module = module;
        ran(module, (device.*step)());
        double worst = 0;
        for (const auto& [name, errors] : device.errors()) worst = std::max(worst, errors.of_bound);
        if (worst <= 1) wrong(std::string(module) + " was not found");
    };
    too_far("attention_unmasked", device, &Device::forward);
    too_far("attention_unmasked", causal, &Device::forward);
    too_far("attention_unmasked", causal, &Device::backward_queries);
    too_far("attention_unmasked", far, &Device::backward_queries);
    too_far("attention_misplaced", device, &Device::forward);
    too_far("attention_misplaced", device, &Device::backward_queries);
    too_far("attention_misplaced", device, &Device::backward_keys);
    // Rows that lie further apart than they do, and closer.
    device.module = "attention_bf16";
    device.sizes.k.token += 8;
    found("attention with a stride too long", "not allocated", [&] { return device.forward(); });
    device.sizes.k.token -= 16;
    ran("attention with a stride too short", device.all());
    if (device.errors()["out"].of_bound <= 1) wrong("attention with a stride too short was not found");
}

} // namespace

void check_attention() {
    for (int width : {40, 64, 80, 160, 512}) comparisons(width);
    same_bits();
    mistakes();
}
