// cuBLASLt as we call it: products of f32 or bf16 with sums in f32, another matrix and a bias added before the result is
// rounded. The one algorithm asks for scratch memory as the real ones may, and every byte of it is written.
#include "numbers.h"
#include "runtime.h"

#include <cstdio>

using namespace software;

namespace {

enum Status { SUCCESS = 0, INVALID_VALUE = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };
enum { COMPUTE_32F = 68, COMPUTE_32F_FAST_TF32 = 77, R_32F = 0, R_16BF = 14 };
enum { OP_N = 0, OP_T = 1, EPILOGUE_DEFAULT = 1, EPILOGUE_BIAS = 4 };
enum { TRANS_A = 3, TRANS_B = 4, EPILOGUE = 7, BIAS_POINTER = 8 };             // of a product
enum { BATCH_COUNT = 5, BATCH_OFFSET = 6 };                                     // of a layout
enum { MAX_WORKSPACE = 1, REDUCTION_SCHEME = 3, ALIGNMENT_A = 5, ALIGNMENT_D = 8 }; // of a preference

// Stored by columns, `batch` matrices of which one begins every `stride` elements.
struct Layout {
    int type;
    uint64_t rows, cols;
    int64_t pitch;
    int batch = 1;
    int64_t stride = 0;
    Type stored() const { return type == R_32F ? Type::F32 : Type::BF16; }
    bool check(const void* data, Access access) const {
        const size_t bytes = size_of(stored());
        for (int i = 0; i < (stride ? batch : 1); ++i) {
            if (!check_runs((const char*)data + i * stride * bytes, rows * bytes, cols, pitch * bytes, access)) return false;
        }
        return true;
    }
    float at(const void* data, int i, bool transposed, size_t row, size_t col) const {
        return load(data, i * stride + (transposed ? col + row * pitch : row + col * pitch), stored());
    }
};
struct Product {
    bool tf32;
    int trans_a = OP_N, trans_b = OP_N;
    unsigned epilogue = EPILOGUE_DEFAULT;
    const void* bias = nullptr;
};
struct Preference {
    uint64_t most = 0;
    unsigned alignment = 256;
};
struct Algorithm {
    uint64_t bytes, alignment, rest[6];
};
struct Heuristic {
    Algorithm algorithm;
    size_t bytes;
    int state;
    float waves;
    int reserved[4];
};

int handle_value;

int refuse(const char* what, int value) {
    fprintf(stderr, "software CUDA: cublasLt: %s %d is not supported\n", what, value);
    return NOT_SUPPORTED;
}

// Whether the matrices belong together, all of one type.
bool agree(const Product& product, const Layout& a, const Layout& b, const Layout& c, const Layout& d) {
    const uint64_t m = product.trans_a ? a.cols : a.rows, k = product.trans_a ? a.rows : a.cols;
    const uint64_t inner = product.trans_b ? b.cols : b.rows, n = product.trans_b ? b.rows : b.cols;
    bool same = inner == k;
    for (const Layout* layout : {&a, &b, &c, &d}) {
        same = same && layout->type == d.type && layout->batch == d.batch && layout->pitch >= (int64_t)layout->rows;
    }
    for (const Layout* layout : {&c, &d}) same = same && layout->rows == m && layout->cols == n;
    return same;
}

} // namespace

extern "C" {
int cublasLtCreate(void** handle) { return *handle = &handle_value, SUCCESS; }
int cublasLtDestroy(void*) { return SUCCESS; }
int cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t cols, int64_t pitch) {
    if (type != R_32F && type != R_16BF) return refuse("type", type);
    return *layout = new Layout{type, rows, cols, pitch, 1, 0}, SUCCESS;
}
int cublasLtMatrixLayoutDestroy(Layout* layout) { return delete layout, SUCCESS; }
int cublasLtMatrixLayoutSetAttribute(Layout* layout, int attribute, const void* value, size_t bytes) {
    if (attribute == BATCH_COUNT && bytes == 4) return layout->batch = *(const int*)value, SUCCESS;
    if (attribute == BATCH_OFFSET && bytes == 8) return layout->stride = *(const int64_t*)value, SUCCESS;
    return refuse("attribute of a layout", attribute);
}
int cublasLtMatmulDescCreate(Product** product, int compute, int scale) {
    if ((compute != COMPUTE_32F && compute != COMPUTE_32F_FAST_TF32) || scale != R_32F)
        return refuse("computing type", compute);
    return *product = new Product{compute == COMPUTE_32F_FAST_TF32}, SUCCESS;
}
int cublasLtMatmulDescDestroy(Product* product) { return delete product, SUCCESS; }
int cublasLtMatmulDescSetAttribute(Product* product, int attribute, const void* value, size_t bytes) {
    if (bytes != (attribute == BIAS_POINTER ? 8 : 4)) return INVALID_VALUE;
    switch (attribute) {
    case TRANS_A: product->trans_a = *(const int*)value; return SUCCESS;
    case TRANS_B: product->trans_b = *(const int*)value; return SUCCESS;
    case EPILOGUE: product->epilogue = *(const unsigned*)value; return SUCCESS;
    case BIAS_POINTER: product->bias = *(const void* const*)value; return SUCCESS;
    }
    return refuse("attribute of a product", attribute);
}
int cublasLtMatmulPreferenceCreate(Preference** preference) { return *preference = new Preference(), SUCCESS; }
int cublasLtMatmulPreferenceDestroy(Preference* preference) { return delete preference, SUCCESS; }
int cublasLtMatmulPreferenceSetAttribute(Preference* preference, int attribute, const void* value, size_t bytes) {
    if (bytes != (attribute == MAX_WORKSPACE ? 8 : 4)) return INVALID_VALUE;
    if (attribute == MAX_WORKSPACE) return preference->most = *(const uint64_t*)value, SUCCESS;
    if (attribute == REDUCTION_SCHEME) return SUCCESS;
    if (attribute < ALIGNMENT_A || attribute > ALIGNMENT_D) return refuse("attribute of a preference", attribute);
    return preference->alignment = *(const unsigned*)value, SUCCESS;
}

int cublasLtMatmulAlgoGetHeuristic(void*, Product* product, Layout* a, Layout* b, Layout* c, Layout* d,
                                   Preference* preference, int, Heuristic* found, int* n_found) {
    if (!agree(*product, *a, *b, *c, *d)) return INVALID_VALUE;
    const uint64_t bytes = 1024 < preference->most ? 1024 : 0;
    *found = {{bytes, preference->alignment, {}}, bytes, SUCCESS, 1, {}};
    return *n_found = 1, SUCCESS;
}

int cublasLtMatmul(void*, Product* product, const void* alpha_, const void* a, Layout* la, const void* b, Layout* lb,
                   const void* beta_, const void* c, Layout* lc, void* d, Layout* ld, const Algorithm* algorithm,
                   void* space, size_t bytes, void*) {
    Lock lock;
    begin("cublasLtMatmul");
    const float alpha = *(const float*)alpha_, beta = *(const float*)beta_;
    const bool biased = product->epilogue == EPILOGUE_BIAS;
    if (!agree(*product, *la, *lb, *lc, *ld) || (!biased && product->epilogue != EPILOGUE_DEFAULT) ||
        bytes < algorithm->bytes) {
        fprintf(stderr, "software CUDA: cublasLtMatmul: what is described does not agree, or too little scratch memory\n");
        return INVALID_VALUE;
    }
    for (const void* address : {a, b, c, (const void*)d}) {
        if ((uint64_t)address % algorithm->alignment == 0) continue;
        fprintf(stderr, "software CUDA: cublasLtMatmul: %p is no multiple of %u\n", address,
                (unsigned)algorithm->alignment);
        return INVALID_VALUE;
    }
    const size_t m = ld->rows, n = ld->cols, k = product->trans_a ? la->rows : la->cols;
    if (!la->check(a, READ) || !lb->check(b, READ) || (beta != 0 && !lc->check(c, READ)) ||
        (biased && !check(product->bias, m * size_of(ld->stored()), READ)) || !check(space, algorithm->bytes, WRITE) ||
        !ld->check(d, WRITE)) {
        return EXECUTION_FAILED;
    }
    if (recording()) return SUCCESS;
    memset(space, 0xff, algorithm->bytes);
    std::vector<float> left(m * k), right(k * n), result;
    for (int batch = 0; batch < ld->batch; ++batch) {
        for (size_t i = 0; i < m * k; ++i) left[i] = la->at(a, batch, product->trans_a, i / k, i % k);
        for (size_t i = 0; i < k * n; ++i) right[i] = lb->at(b, batch, product->trans_b, i / n, i % n);
        if (product->tf32) round_to_tf32(left), round_to_tf32(right);
        result.assign(m * n, 0.0f);
        multiply(left.data(), right.data(), result.data(), m, n, k);
        for (size_t i = 0; i < m * n; ++i) {
            const size_t row = i / n, col = i % n;
            float v = alpha * result[i] + (beta != 0 ? beta * lc->at(c, batch, false, row, col) : 0.0f);
            if (biased) v += load(product->bias, row, ld->stored());
            store(d, batch * ld->stride + row + col * ld->pitch, ld->stored(), v);
        }
    }
    return SUCCESS;
}
}
