// Numbers of the libraries: f32 and bf16 in memory, f32 in computing.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace software {

enum class Type { F32, BF16 };
inline size_t size_of(Type type) { return type == Type::F32 ? 4 : 2; }

inline float load(const void* p, size_t i, Type type) {
    if (type == Type::F32) return ((const float*)p)[i];
    const uint32_t bits = uint32_t(((const uint16_t*)p)[i]) << 16;
    float v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

inline void store(void* p, size_t i, Type type, float v) {
    if (type == Type::F32) {
        ((float*)p)[i] = v;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    // To nearest, ties to even.
    ((uint16_t*)p)[i] = v != v ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// To 10 bits of mantissa, to nearest, ties away from zero: what bf16 holds stays as it is.
inline void round_to_tf32(std::vector<float>& values) {
    for (float& v : values) {
        uint32_t bits;
        memcpy(&bits, &v, sizeof bits);
        if ((bits & 0x7f800000) != 0x7f800000) bits = (bits + 0x1000) & 0xffffe000;
        memcpy(&v, &bits, sizeof bits);
    }
}

// c[m, n] += a[m, k] b[k, n], row by row. Sums of 64 products are added up, which errs less than one long sum.
inline void multiply(const float* a, const float* b, float* c, size_t m, size_t n, size_t k) {
    std::vector<float> row(n);
    for (size_t i = 0; i < m; ++i) {
        for (size_t from = 0; from < k; from += 64) {
            std::fill(row.begin(), row.end(), 0.0f);
            for (size_t p = from; p < from + 64 && p < k; ++p) {
                const float factor = a[i * k + p];
                const float* line = b + p * n;
                for (size_t j = 0; j < n; ++j) row[j] += factor * line[j];
            }
            for (size_t j = 0; j < n; ++j) c[i * n + j] += row[j];
        }
    }
}

} // namespace software
