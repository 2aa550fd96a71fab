// cuBLAS as we and candle call it: matrix products of f32 or bf16, with sums in f32. Every operand must lie within its
// allocation and have been written.
#include "numbers.h"
#include "runtime.h"

#include <algorithm>
#include <cstdio>

using namespace software;

namespace {

enum Status { SUCCESS = 0, INVALID_VALUE = 7, NOT_SUPPORTED = 15, EXECUTION_FAILED = 13 };
enum { COMPUTE_32F = 68, COMPUTE_32F_FAST_TF32 = 77, R_32F = 0, R_16BF = 14, OP_N = 0, OP_T = 1, DISALLOW_REDUCED_PRECISION = 16 };

int handle_value;

// Stored by columns: element (i, j) lies at i + j * pitch, or at j + i * pitch if transposed.
struct Matrix {
    const char* data;
    Type type;
    size_t rows, cols, pitch, stride;
    bool transposed;

    bool check(size_t batch, Access access) const {
        const size_t run = transposed ? cols : rows, runs = transposed ? rows : cols, bytes = size_of(type);
        for (size_t b = 0; b < (stride ? batch : 1); ++b) {
            if (!check_runs(data + b * stride * bytes, run * bytes, runs, pitch * bytes, access)) return false;
        }
        return true;
    }
    // Row by row.
    void read(size_t b, std::vector<float>& to) const {
        to.resize(rows * cols);
        for (size_t i = 0; i < rows; ++i) {
            for (size_t j = 0; j < cols; ++j) {
                to[i * cols + j] = load(data, b * stride + (transposed ? j + i * pitch : i + j * pitch), type);
            }
        }
    }
};

int unsupported(const char* what, int mode, const char* wanted) {
    fprintf(stderr, "software CUDA: %s: mode %d; wanted is %s\n", what, mode, wanted);
    return NOT_SUPPORTED;
}

bool type_of(int code, Type& type) {
    type = code == R_32F ? Type::F32 : Type::BF16;
    return code == R_32F || code == R_16BF;
}

int product(const char* what, int op_a, int op_b, int m, int n, int k, const void* alpha_, const void* a, int type_a,
            int pitch_a, long long stride_a, const void* b, int type_b, int pitch_b, long long stride_b,
            const void* beta_, void* c, int type_c, int pitch_c, long long stride_c, int batch, int compute) {
    Lock lock;
    begin(what);
    Type ta, tb, tc;
    const bool tf32 = compute == COMPUTE_32F_FAST_TF32;
    if ((compute != COMPUTE_32F && !tf32) || !type_of(type_a, ta) || !type_of(type_b, tb) || !type_of(type_c, tc) ||
        ta != tb || (ta == Type::F32 && tc != Type::F32) || (tf32 && ta != Type::F32) || op_a > OP_T || op_b > OP_T) {
        fprintf(stderr,
                "software CUDA: %s: types %d, %d and %d, computing type %d, operations %d and %d; wanted are f32 (%d) "
                "or bf16 (%d), a and b alike and c f32 if they are, computing type %d, or %d for f32, operations %d or %d\n",
                running().c_str(), type_a, type_b, type_c, compute, op_a, op_b, R_32F, R_16BF, COMPUTE_32F,
                COMPUTE_32F_FAST_TF32, OP_N, OP_T);
        return NOT_SUPPORTED;
    }
    const int least_a = std::max(1, op_a ? k : m), least_b = std::max(1, op_b ? n : k), least_c = std::max(1, m);
    if (m < 0 || n < 0 || k < 0 || batch < 0 || pitch_a < least_a || pitch_b < least_b || pitch_c < least_c) {
        fprintf(stderr,
                "software CUDA: %s: m %d, n %d, k %d, %d products, pitches %d, %d and %d; wanted are no negative "
                "numbers and pitches of at least %d, %d and %d\n",
                running().c_str(), m, n, k, batch, pitch_a, pitch_b, pitch_c, least_a, least_b, least_c);
        return INVALID_VALUE;
    }
    const float alpha = *(const float*)alpha_, beta = *(const float*)beta_;
    const size_t sm = m, sn = n, sk = k;
    const Matrix ma = {(const char*)a, ta, sm, sk, size_t(pitch_a), size_t(stride_a), op_a == OP_T};
    const Matrix mb = {(const char*)b, tb, sk, sn, size_t(pitch_b), size_t(stride_b), op_b == OP_T};
    const Matrix mc = {(const char*)c, tc, sm, sn, size_t(pitch_c), size_t(stride_c), false};
    if (batch > 1 && stride_c == 0) {
        fprintf(stderr, "software CUDA: %s: %d products would be written to one place; wanted is a stride of c\n",
                running().c_str(), batch);
        return INVALID_VALUE;
    }
    if (!ma.check(batch, READ) || !mb.check(batch, READ) || (beta != 0 && !mc.check(batch, READ)) ||
        !mc.check(batch, WRITE)) {
        return EXECUTION_FAILED;
    }
    if (recording()) return SUCCESS;
    std::vector<float> left, right, result;
    for (int i = 0; i < batch; ++i) {
        ma.read(i, left);
        mb.read(i, right);
        if (tf32) {
            round_to_tf32(left);
            round_to_tf32(right);
        }
        result.assign(sm * sn, 0.0f);
        multiply(left.data(), right.data(), result.data(), sm, sn, sk);
        for (size_t row = 0; row < sm; ++row) {
            for (size_t col = 0; col < sn; ++col) {
                const size_t at = i * stride_c + row + col * pitch_c;
                const float before = beta != 0 ? beta * load(c, at, tc) : 0.0f;
                store(c, at, tc, alpha * result[row * sn + col] + before);
            }
        }
    }
    return SUCCESS;
}

} // namespace

extern "C" {
int cublasCreate_v2(void** handle) { return *handle = &handle_value, SUCCESS; }
int cublasDestroy_v2(void*) { return SUCCESS; }
int cublasSetStream_v2(void*, void*) { return SUCCESS; }
int cublasSetWorkspace_v2(void*, void*, size_t) { return SUCCESS; }
int cublasGetPointerMode_v2(void*, int* mode) { return *mode = 0, SUCCESS; }
int cublasSetPointerMode_v2(void*, int mode) {
    return mode == 0 ? SUCCESS : unsupported("cublasSetPointerMode", mode, "0, factors on the host");
}
int cublasSetMathMode(void*, int mode) {
    // Factors are rounded to TF32 by the computing type alone, and parts of sums never to bf16.
    return mode == 0 || mode == DISALLOW_REDUCED_PRECISION ? SUCCESS
                                                           : unsupported("cublasSetMathMode", mode, "0 or 16");
}

int cublasGemmStridedBatchedEx(void*, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a,
                               int type_a, int pitch_a, long long stride_a, const void* b, int type_b, int pitch_b,
                               long long stride_b, const void* beta, void* c, int type_c, int pitch_c,
                               long long stride_c, int batch, int compute, int) {
    return product("cublasGemmStridedBatchedEx", op_a, op_b, m, n, k, alpha, a, type_a, pitch_a, stride_a, b, type_b,
                   pitch_b, stride_b, beta, c, type_c, pitch_c, stride_c, batch, compute);
}
int cublasGemmEx(void*, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a, int type_a,
                 int pitch_a, const void* b, int type_b, int pitch_b, const void* beta, void* c, int type_c,
                 int pitch_c, int compute, int) {
    return product("cublasGemmEx", op_a, op_b, m, n, k, alpha, a, type_a, pitch_a, 0, b, type_b, pitch_b, 0, beta, c,
                   type_c, pitch_c, 0, 1, compute);
}
}
