// Checks the software device's tensor cores and asynchronous copies by what NVIDIA's "PTX ISA 9.0" says of their
// registers, in the words of its sections "Matrix Fragments for mma.m16n8k16 with floating point type", the same for
// m16n8k8, and "Warp-level matrix load instruction: ldmatrix".
#include "check.h"

#include <cmath>

namespace {

uint16_t bits_of(float v) {
    uint16_t r;
    software::store(&r, 0, Type::BF16, v);
    return r;
}
// Two bf16 in a register, element i in half i % 2.
void put(std::vector<unsigned>& registers, int lane, int per_lane, int i, float v) {
    registers[lane * per_lane + i / 2] |= unsigned(bits_of(v)) << 16 * (i % 2);
}

struct Words {
    Buffer buffer;
    Words(const std::vector<unsigned>& values) : buffer(values.size()) {
        cuMemcpyHtoD_v2(buffer.address, values.data(), 4 * values.size());
    }
};

void fragments(int depth) {
    const Numbers a = held(drawn(16 * depth, 41), Type::BF16), b = held(drawn(depth * 8, 42), Type::BF16);
    const Numbers c = drawn(16 * 8, 43);
    std::vector<unsigned> a_words(32 * 4), b_words(32 * 2);
    Numbers c_words(32 * 4);
    // By element i of a lane's vector: row and column.
    const auto c_row = [](int group, int i) { return i < 2 ? group : group + 8; };
    const auto c_col = [](int in_group, int i) { return in_group * 2 + (i & 1); };
    for (int lane = 0; lane < 32; ++lane) {
        const int group = lane >> 2, in_group = lane % 4;
        for (int i = 0; i < depth / 2; ++i) {
            const int row = (0 <= i && i < 2) || (4 <= i && i < 6) ? group : group + 8;
            const int col = i < 4 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
            put(a_words, lane, 4, i, a[row * depth + col]);
        }
        for (int i = 0; i < depth / 4; ++i) {
            const int row = i < 2 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
            put(b_words, lane, 2, i, b[row * 8 + group]);
        }
        for (int i = 0; i < 4; ++i) c_words[lane * 4 + i] = c[c_row(group, i) * 8 + c_col(in_group, i)];
    }
    const Words left(a_words), right(b_words);
    const Buffer sums(c_words);
    const std::string what = "a product of fragments of depth " + std::to_string(depth);
    ran(what, launch("tensor_cores", "multiply_fragments", 1, 32, left.buffer, right.buffer, sums, depth));
    Numbers got;
    if (!sums.read(got)) return wrong(what + ": unreadable");
    for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 4; ++i) {
            const int row = c_row(lane >> 2, i), col = c_col(lane % 4, i);
            double wanted = c[row * 8 + col];
            for (int k = 0; k < depth; ++k) wanted += (double)a[row * depth + k] * b[k * 8 + col];
            if (!(std::fabs(got[lane * 4 + i] - wanted) < 2e-6)) return wrong(what);
        }
    }
}

void matrices(int transposed, int count) {
    const Numbers rows = held(drawn(32 * 8, 44), Type::BF16);
    const Buffer from(rows, Type::BF16), words(32 * 4);
    const int wait = 1, beyond = 0;
    const std::string what = "loading " + std::to_string(count) + (transposed ? " matrices transposed" : " matrices");
    ran(what, launch("tensor_cores", "load_fragments", 1, 32, from, words, transposed, count, wait, beyond));
    std::vector<unsigned> got(32 * 4);
    cuMemcpyDtoH_v2(got.data(), words.address, 4 * got.size());
    for (int lane = 0; lane < 32; ++lane) {
        for (int j = 0; j < count; ++j) {
            for (int half = 0; half < 2; ++half) {
                const int row = lane / 4, col = lane % 4 * 2 + half;
                const float wanted = transposed ? rows[(8 * j + col) * 8 + row] : rows[(8 * j + row) * 8 + col];
                if ((got[4 * lane + j] >> 16 * half & 0xffff) != bits_of(wanted)) return wrong(what);
            }
        }
    }
}

void mistakes() {
    const Buffer rows(drawn(32 * 8, 45), Type::BF16), words(32 * 4), y(32);
    const int no = 0, yes = 1, four = 4, odd = 1, far = 64;
    const auto kernel = [&](const char* name, const auto&... arguments) {
        return launch("tensor_cores", name, 1, 32, arguments...);
    };
    found("a copy that nobody waits for", "which this block has not written",
          [&] { return kernel("load_fragments", rows, words, no, four, no, no); });
    found("a misaligned copy", "not a multiple of 16",
          [&] { return kernel("load_fragments", rows, words, no, four, yes, odd); });
    found("a copy from beyond", "not allocated",
          [&] { return kernel("load_fragments", rows, words, no, four, yes, far); });
    ran("copies with their barrier", kernel("copy_too_soon", rows, y, yes));
    found("a copy that begins too soon", "without a barrier in between",
          [&] { return kernel("copy_too_soon", rows, y, no); });
    found("a copy without an end", "without waiting", [&] { return kernel("copy_without_end", rows); });
    found("a product of half a warp", "of which only 0xffff come", [&] { return kernel("mma_for_some", y); });
    dynamic_bytes = 8;
    found("a copy into too little", "which end too soon",
          [&] { return kernel("load_fragments", rows, words, no, four, yes, no); });
}

} // namespace

void check_tensor_cores() {
    fragments(16);
    fragments(8);
    dynamic_bytes = 32 * 16;
    matrices(0, 4);
    matrices(1, 4);
    matrices(1, 2);
    mistakes();
    dynamic_bytes = 0;
}
