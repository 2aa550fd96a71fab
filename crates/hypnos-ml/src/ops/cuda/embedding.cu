// Rows of a table by their numbers.
#include "common.cuh"

// y[t] = table[ids[t]], rows of `cols`. One block per token. The caller has checked the ids.
extern "C" __global__ void embedding(const real* table, const unsigned* ids, real* y, int cols) {
    const real* row = table + (long long)ids[blockIdx.x] * cols;
    real* out = y + (long long)blockIdx.x * cols;
    for (int i = threadIdx.x; i < cols; i += blockDim.x) out[i] = row[i];
}

// d_table[ids[t]] += dy[t], f32. One block per token. Only the first token with an id writes, summing over all of them
// in their order, so that no two blocks share a row and the sum does not depend on who comes first.
extern "C" __global__ void embedding_bwd(const real* dy, const unsigned* ids, float* d_table, int tokens, int cols) {
    const unsigned id = ids[blockIdx.x];
    bool earlier = false;
    for (int t = threadIdx.x; t < blockIdx.x; t += blockDim.x) earlier |= ids[t] == id;
    if (__syncthreads_or(earlier)) return;
    for (int i = threadIdx.x; i < cols; i += blockDim.x) {
        float sum = 0.0f;
        for (int t = blockIdx.x; t < tokens; ++t) {
            if (ids[t] == id) sum += load(dy + (long long)t * cols + i);
        }
        d_table[(long long)id * cols + i] += sum;
    }
}
