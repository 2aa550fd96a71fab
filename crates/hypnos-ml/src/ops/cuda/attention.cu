// Attention whose scores are never in global memory: FlashAttention-2 (Dao 2023, arXiv 2307.08691), forward by its
// algorithm 1 and backward by its algorithm 2, which is cut in two so that nothing is added with atomics: one kernel per
// block of keys for the gradients of keys and values, one per block of queries for that of the queries. Each computes
// the probabilities again, so backward has seven products instead of five.
//
// Tensors are [batch, tokens, heads, D] by the strides of `Layout`: projections as they are, or parts of one product. D
// numbers of a head lie side by side, begin at a multiple of 16 bytes and are a multiple of 8.
//
// A warp works on 16 M rows of the result and passes over all rows of the other side, which its block brings to shared
// memory in tiles, the next one while the last is worked on. Scores and sums are f32. What is multiplied is bf16, so
// the probabilities and the gradients of scores are rounded once, as those that go through memory elsewhere are.
//
// The columns of a wide head are cut into PARTS with WARPS warps each, for a lane has no registers for sums of all of
// them. What each part has of the scores is added up through shared memory. Where there are few keys and many queries,
// as between a picture and its caption, the queries of a tile are divided among SPLITS groups of warps, so that more
// warps work; the sums of the groups are added up at the end.
#include "mma.cuh"

// Where a head's row of a tensor is, in elements.
struct Layout {
    long long batch;
    int token, head;
};
struct Attention {
    int batch, heads, queries, keys, causal; // causal: a query sees the keys up to its own place
    float scale;
    Layout q, k, v, out, d_out, d_q, d_k, d_v; // those that a kernel does not name may be anything
};

// delta = sum(d_out * out) of each row of each head, [batch, heads, queries] ("D" in algorithm 2). Eight lanes per row:
// ceil(batch * queries * heads / 32) blocks of 256 threads.
extern "C" __global__ void attention_delta(const real* out, const real* d_out, float* delta, Attention sizes, int width) {
    const long long row = thread_index() / 8;
    const bool exists = row < (long long)sizes.batch * sizes.queries * sizes.heads;
    const int head = (int)(row % sizes.heads), token = (int)(row / sizes.heads % sizes.queries);
    const int b = (int)(row / sizes.heads / sizes.queries);
    const Layout y = sizes.out, dy = sizes.d_out;
    out += b * y.batch + (long long)token * y.token + head * y.head;
    d_out += b * dy.batch + (long long)token * dy.token + head * dy.head;
    float sum = 0.0f;
    for (int i = 4 * (threadIdx.x % 8); exists && i < width; i += 32) {
        const Four a = load4(out + i), d = load4(d_out + i);
        for (int k = 0; k < 4; ++k) sum += a.v[k] * d.v[k];
    }
    for (int mask = 4; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
    if (exists && threadIdx.x % 8 == 0) delta[((long long)b * sizes.heads + head) * sizes.queries + token] = sum;
}

// Tensor cores multiply bf16: all that follows is there for that storage only.
#define STORAGE_IS_float 0
#define STORAGE_IS_bf16 1
#define STORAGE_IS(type) STORAGE_IS_##type
#define STORAGE_IS_ONE(type) STORAGE_IS(type)
#if STORAGE_IS_ONE(REAL)

const float LOG2_E = 1.4426950408889634f;

// Elements from one row of a tile to the next: an odd number of 16 bytes, so that eight rows at one column, which
// ldmatrix reads at once, lie in different banks.
template <int D> constexpr int PITCH = D / 8 % 2 ? D : D + 8;

// What a block works on: rows from `first` of one head.
struct Place {
    long long batch;
    int head, first;
};
// Blocks are numbered by batch, head and block of rows, the last fastest, so that neighbours share what they read.
__device__ inline Place place_of(int heads, int rows, int rows_per_block) {
    const int blocks = (rows + rows_per_block - 1) / rows_per_block;
    const int which = blockIdx.x / blocks;
    return {which / heads, which % heads, (int)(blockIdx.x % blocks) * rows_per_block};
}
// The rows of one head in a tensor, `stride` elements apart.
template <class T> struct Rows {
    T* first;
    int stride, n;

    __device__ inline T* at(int row) const { return first + (long long)row * stride; }
    __device__ inline Rows from_column(int col) const { return {first + col, stride, n}; }
};
template <class T> __device__ inline Rows<T> rows_of(T* p, const Layout& layout, const Place& place, int n) {
    return {p + place.batch * layout.batch + (long long)place.head * layout.head, layout.token, n};
}
// The numbers of a head's rows, one for each, [batch, heads, rows].
template <class T> __device__ inline T* numbers_of(T* p, int heads, const Place& place, int n) {
    return p + (place.batch * heads + place.head) * n;
}

__device__ inline int lane() { return threadIdx.x % 32; }
__device__ inline int warp() { return threadIdx.x / 32; }

// Begins to bring ROWS rows from `first` to a tile. Rows that do not exist are 0. As many threads as share whole rows
// work, so that each has one column.
template <int D, int ROWS, int THREADS>
__device__ inline void bring_tile(bf16* tile, const Rows<const bf16>& from, int first) {
    constexpr int PIECES = D / 8, AT_ONCE = THREADS / PIECES;
    const int mine = threadIdx.x / PIECES, col = threadIdx.x % PIECES * 8;
    const bf16* at = from.at(first + mine) + col;
#pragma unroll
    for (int step = 0; step < ROWS; step += AT_ONCE) {
        const int row = mine + step;
        if (mine >= AT_ONCE || row >= ROWS) continue;
        copy_16_bytes(tile + row * PITCH<D> + col, at + (long long)step * from.stride, first + row < from.n);
    }
}
// The same for one number per row.
template <int ROWS, int THREADS>
__device__ inline void bring_numbers(float* to, const float* from, int first, int n) {
    for (int i = threadIdx.x; i < ROWS; i += THREADS) copy_4_bytes(to + i, from + first + i, first + i < n);
}

// 16 M rows of D columns as A's of products: in registers.
template <int M, int D> struct InRegisters {
    unsigned r[M][(D + 15) / 16][4];

    // Row `first` and those that follow it, from global memory. Rows that do not exist are 0.
    __device__ inline void load(const Rows<const bf16>& from, int first) {
#pragma unroll
        for (int half = 0; half < 2 * M; ++half) {
            const int row = first + 8 * half + lane() / 4;
            const bf16* at = from.at(row) + lane() % 4 * 2;
#pragma unroll
            for (int c = 0; c < D / 8; ++c) {
                r[half / 2][c / 2][c % 2 * 2 + half % 2] = row < from.n ? *(const unsigned*)(at + 8 * c) : 0;
            }
        }
    }
    __device__ inline void get(unsigned (&a)[4], int m, int k) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = r[m][k][i];
    }
};
// The same in a tile of shared memory.
template <int D> struct InShared {
    const bf16* tile; // the first row

    __device__ inline void get(unsigned (&a)[4], int m, int k) const {
        load_4_matrices(a, tile + (16 * m + lane() % 16) * PITCH<D> + 16 * k + lane() / 16 * 8);
    }
};

// c += a t^T, where t has 8 N rows of D columns, P elements apart.
template <int P, int D, int M, int N, class A>
__device__ inline void multiply_by_rows(float (&c)[M][N][4], const A& a, const bf16* t) {
    // Two times eight rows, two times eight columns.
    const bf16* four = t + (lane() / 16 * 8 + lane() % 8) * P + lane() / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        unsigned left[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) a.get(left[m], m, k);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            unsigned right[4];
            load_4_matrices(right, four + n * 8 * P + k * 16);
#pragma unroll
            for (int m = 0; m < M; ++m) {
                mma_16x8x16(c[m][n], left[m], right[0], right[1]);
                mma_16x8x16(c[m][n + 1], left[m], right[2], right[3]);
            }
        }
    }
    if constexpr (D % 16 != 0) {
        static_assert(N % 4 == 0, "four times eight rows at once");
        unsigned left[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) a.get(left[m], m, D / 16);
#pragma unroll
        for (int n = 0; n < N; n += 4) {
            unsigned right[4];
            load_4_matrices(right, t + (n * 8 + lane()) * P + D - 8);
#pragma unroll
            for (int m = 0; m < M; ++m) {
#pragma unroll
                for (int j = 0; j < 4; ++j) mma_16x8x8(c[m][n + j], left[m], right[j]);
            }
        }
    }
}

// c += a t, where t has 16 K rows of D columns, P elements apart.
template <int P, int D, int M, int K>
__device__ inline void multiply(float (&c)[M][D / 8][4], const unsigned (&a)[M][K][4], const bf16* t) {
    const bf16* four = t + lane() % 16 * P + lane() / 16 * 8;
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int n = 0; n + 1 < D / 8; n += 2) {
            unsigned right[4];
            load_4_transposed(right, four + k * 16 * P + n * 8);
#pragma unroll
            for (int m = 0; m < M; ++m) {
                mma_16x8x16(c[m][n], a[m][k], right[0], right[1]);
                mma_16x8x16(c[m][n + 1], a[m][k], right[2], right[3]);
            }
        }
        if constexpr (D % 16 != 0) {
            unsigned right[4];
            load_2_transposed(right, t + (k * 16 + lane() % 16) * P + D - 8);
#pragma unroll
            for (int m = 0; m < M; ++m) mma_16x8x16(c[m][D / 8 - 1], a[m][k], right[0], right[1]);
        }
    }
}

template <int M, int N> __device__ inline void clear(float (&c)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) c[m][n][i] = 0.0f;
        }
    }
}

// f(element, row, column, m, half) for each element of c, whose first is (row, col) and where 2 m + half numbers the
// rows that a lane has.
template <int M, int N, class F> __device__ inline void each(float (&c)[M][N][4], int row, int col, F f) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                f(c[m][n][i], row + 16 * m + i / 2 * 8 + lane() / 4, col + 8 * n + lane() % 4 * 2 + i % 2, m, i / 2);
            }
        }
    }
}

// c to the sum of what the PARTS have, added in the same order everywhere. Has a barrier, and before the next use of
// `room`, 128 M N numbers per warp, there must be another one.
template <int PARTS, int WARPS, int M, int N> __device__ inline void add_parts(float (&c)[M][N][4], float* room) {
    if constexpr (PARTS > 1) {
        constexpr int PER_WARP = 128 * M * N;
        int i = 0;
        each(c, 0, 0, [&](float& v, int, int, int, int) { room[warp() * PER_WARP + 32 * i++ + lane()] = v; });
        __syncthreads();
        i = 0;
        each(c, 0, 0, [&](float& v, int, int, int, int) {
            v = 0.0f;
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                v += room[(part * WARPS + warp() % WARPS) * PER_WARP + 32 * i + lane()];
            }
            ++i;
        });
    }
}

// c, rounded, as the A's of a product.
template <int M, int N> __device__ inline void pack(unsigned (&a)[M][N / 2][4], const float (&c)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                a[m][n / 2][n % 2 * 2 + half] = pack_bf16(c[m][n][2 * half], c[m][n][2 * half + 1]);
            }
        }
    }
}

__device__ inline void store_pair(bf16* p, float first, float second) { *(unsigned*)p = pack_bf16(first, second); }
__device__ inline void store_pair(float* p, float first, float second) { p[0] = first, p[1] = second; }

// The rows that exist, from row `first` of `to`.
template <int M, int N, class T>
__device__ inline void write_rows(const float (&c)[M][N][4], const Rows<T>& to, int first) {
#pragma unroll
    for (int half = 0; half < 2 * M; ++half) {
        const int row = first + 8 * half + lane() / 4, i = half % 2 * 2;
        T* at = to.at(row) + lane() % 4 * 2;
#pragma unroll
        for (int n = 0; n < N; ++n) {
            if (row < to.n) store_pair(at + 8 * n, c[half / 2][n][i], c[half / 2][n][i + 1]);
        }
    }
}
template <int M, int N> __device__ inline void multiply_all(float (&c)[M][N][4], float factor) {
    each(c, 0, 0, [&](float& v, int, int, int, int) { v *= factor; });
}

// What the four lanes that share a row have together.
__device__ inline float row_max(float v) {
    v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
    return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}
__device__ inline float row_sum(float v) {
    v += __shfl_xor_sync(0xffffffffu, v, 1);
    return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

// Whether some of the scores of 16 M queries from `query` with `n` keys from `key` do not count.
template <int M> __device__ inline bool is_masked(const Attention& sizes, int query, int key, int n) {
    return key + n > sizes.keys || (sizes.causal && key + n > query + 1);
}
// Rows are queries.
template <int M, int N>
__device__ inline void mask(float (&scores)[M][N][4], const Attention& sizes, int query, int key) {
    each(scores, query, key, [&](float& score, int row, int col, int, int) {
        if (col >= sizes.keys || (sizes.causal && col > row)) score = -INFINITY;
    });
}

// Rows are keys.
template <int M, int N> __device__ inline void mask_later_keys(float (&scores)[M][N][4], int key, int query) {
    each(scores, key, query, [&](float& score, int row, int col, int, int) {
        if (row > col) score = -INFINITY;
    });
}

// Of each row that a lane has: the largest score so far, and the sum of exponentials relative to it, of its own
// columns.
template <int M> struct Statistics {
    float top[M][2], sum[M][2];
};

// Scores to exponentials, and what was summed before relative to the new largest score, as algorithm 1 has it.
template <int M, int N, int O>
__device__ inline void exponentials(float (&scores)[M][N][4], float (&out)[M][O][4], Statistics<M>& rows, float scale) {
#pragma unroll
    for (int half = 0; half < 2 * M; ++half) {
        const int m = half / 2, h = half % 2, i = 2 * h;
        float top = rows.top[m][h];
#pragma unroll
        for (int n = 0; n < N; ++n) top = fmaxf(top, fmaxf(scores[m][n][i], scores[m][n][i + 1]));
        top = row_max(top);
        const float shrink = exp2_fast((rows.top[m][h] - top) * scale), shift = top * scale;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int j = i; j < i + 2; ++j) {
                scores[m][n][j] = exp2_fast(scores[m][n][j] * scale - shift);
                sum += scores[m][n][j];
            }
        }
#pragma unroll
        for (int n = 0; n < O; ++n) out[m][n][i] *= shrink, out[m][n][i + 1] *= shrink;
        rows.top[m][h] = top;
        rows.sum[m][h] = rows.sum[m][h] * shrink + sum;
    }
}

// The sums of whole rows, and what was summed relative to them.
template <int M, int O> __device__ inline void finish(float (&out)[M][O][4], Statistics<M>& rows) {
#pragma unroll
    for (int half = 0; half < 2 * M; ++half) {
        const int m = half / 2, h = half % 2, i = 2 * h;
        rows.sum[m][h] = row_sum(rows.sum[m][h]);
        const float over = 1.0f / rows.sum[m][h];
#pragma unroll
        for (int n = 0; n < O; ++n) out[m][n][i] *= over, out[m][n][i + 1] *= over;
    }
}

template <int M>
__device__ inline void write_log_sum_exp(const Statistics<M>& rows, float* to, int first, const Attention& sizes) {
#pragma unroll
    for (int half = 0; half < 2 * M; ++half) {
        const int row = first + 8 * half + lane() / 4, m = half / 2, h = half % 2;
        if (row < sizes.queries && lane() % 4 == 0) to[row] = rows.top[m][h] * sizes.scale + logf(rows.sum[m][h]);
    }
}

// out = softmax(scale * q k^T) v, and the logarithm of the sum of each row's exponentials, [batch, heads, queries].
// Grid: batch * heads * ceil(queries / (16 M WARPS)) blocks of 32 WARPS PARTS threads, with room for four tiles and, if
// there are parts, for their scores.
template <int D, int PARTS, int M, int WARPS, int BLOCK_K>
__device__ inline void forward(const bf16* q, const bf16* k, const bf16* v, bf16* out, float* log_sum_exp,
                               const Attention& sizes) {
    constexpr int THREADS = 32 * WARPS * PARTS, BLOCK_Q = 16 * M * WARPS, TILE = BLOCK_K * PITCH<D>;
    constexpr int PART = D / PARTS, N = BLOCK_K / 8;
    DYNAMIC_SHARED(bf16, tiles);
    float* const room = (float*)(tiles + 4 * TILE);
    const Place place = place_of(sizes.heads, sizes.queries, BLOCK_Q);
    const int first = place.first + 16 * M * (warp() % WARPS), part = warp() / WARPS * PART;
    const auto keys = rows_of(k, sizes.k, place, sizes.keys), values = rows_of(v, sizes.v, place, sizes.keys);
    const auto bring = [&](int key, int stage) {
        bf16* to = tiles + stage * 2 * TILE;
        bring_tile<D, BLOCK_K, THREADS>(to, keys, key);
        bring_tile<D, BLOCK_K, THREADS>(to + TILE, values, key);
    };
    bring(0, 0);
    InRegisters<M, PART> queries;
    queries.load(rows_of(q + part, sizes.q, place, sizes.queries), first);
    Statistics<M> rows;
#pragma unroll
    for (int half = 0; half < 2 * M; ++half) {
        rows.top[half / 2][half % 2] = -INFINITY;
        rows.sum[half / 2][half % 2] = 0.0f;
    }
    float sums[M][PART / 8][4];
    clear(sums);
    const int seen = sizes.causal && place.first + BLOCK_Q < sizes.keys ? place.first + BLOCK_Q : sizes.keys;
    for (int key = 0, stage = 0; key < seen; key += BLOCK_K, stage ^= 1) {
        wait_for_copies();
        __syncthreads(); // this tile is there, and nobody works on the last
        if (key + BLOCK_K < seen) bring(key + BLOCK_K, stage ^ 1);
        if (PARTS == 1 && (first >= sizes.queries || (sizes.causal && key >= first + 16 * M))) continue;
        const bf16* tile = tiles + stage * 2 * TILE + part;
        float scores[M][N][4];
        clear(scores);
        multiply_by_rows<PITCH<D>, PART>(scores, queries, tile);
        add_parts<PARTS, WARPS>(scores, room);
        if (is_masked<M>(sizes, first, key, BLOCK_K)) mask(scores, sizes, first, key);
        exponentials(scores, sums, rows, sizes.scale * LOG2_E);
        unsigned p[M][N / 2][4];
        pack(p, scores);
        multiply<PITCH<D>, PART>(sums, p, tile + TILE);
    }
    finish(sums, rows);
    write_rows(sums, rows_of(out + part, sizes.out, place, sizes.queries), first);
    if (part == 0) write_log_sum_exp(rows, numbers_of(log_sum_exp, sizes.heads, place, sizes.queries), first, sizes);
}

// The number of each row that a lane has. Rows that do not exist have 0.
template <int M> __device__ inline void load_numbers(float (&to)[M][2], const float* from, int first, int n) {
#pragma unroll
    for (int half = 0; half < 2 * M; ++half) {
        const int row = first + 8 * half + lane() / 4;
        to[half / 2][half % 2] = row < n ? from[row] : 0.0f;
    }
}

// Scores to probabilities, exp(scale * score - log_sum_exp(column, m, half)), and dp, the gradient of these, to that of
// the scores but for the scale, p (dp - delta(column, m, half)). (Algorithm 2.)
template <int M, int N, class F>
__device__ inline void probabilities(float (&scores)[M][N][4], float scale, F log_sum_exp) {
    each(scores, 0, 0, [&](float& score, int, int col, int m, int half) {
        score = exp2_fast(score * (scale * LOG2_E) - log_sum_exp(col, m, half) * LOG2_E);
    });
}
template <int M, int N, class F>
__device__ inline void through_softmax(float (&dp)[M][N][4], const float (&p)[M][N][4], F delta) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int col = 8 * n + lane() % 4 * 2 + i % 2;
                dp[m][n][i] = p[m][n][i] * (dp[m][n][i] - delta(col, m, i / 2));
            }
        }
    }
}

// The gradient of the queries: d_q = scale * d_scores k, where d_scores = p (d_out v^T - delta). Grid and memory as
// forward's, but for two rooms for the parts. The scores are worked on STEP keys at a time.
template <int D, int PARTS, int M, int WARPS, int BLOCK_K, int STEP, class T>
__device__ inline void backward_queries(const bf16* q, const bf16* k, const bf16* v, const bf16* d_out,
                                        const float* log_sum_exp, const float* delta, T* d_q, const Attention& sizes) {
    constexpr int THREADS = 32 * WARPS * PARTS, BLOCK_Q = 16 * M * WARPS, TILE = BLOCK_K * PITCH<D>;
    constexpr int PART = D / PARTS, N = STEP / 8;
    DYNAMIC_SHARED(bf16, tiles);
    float* const room = (float*)(tiles + 4 * TILE);
    float* const second_room = room + BLOCK_Q * STEP * PARTS;
    const Place place = place_of(sizes.heads, sizes.queries, BLOCK_Q);
    const int first = place.first + 16 * M * (warp() % WARPS), part = warp() / WARPS * PART;
    const auto keys = rows_of(k, sizes.k, place, sizes.keys), values = rows_of(v, sizes.v, place, sizes.keys);
    const auto bring = [&](int key, int stage) {
        bf16* to = tiles + stage * 2 * TILE;
        bring_tile<D, BLOCK_K, THREADS>(to, keys, key);
        bring_tile<D, BLOCK_K, THREADS>(to + TILE, values, key);
    };
    bring(0, 0);
    InRegisters<M, PART> queries, d_outs;
    queries.load(rows_of(q + part, sizes.q, place, sizes.queries), first);
    d_outs.load(rows_of(d_out + part, sizes.d_out, place, sizes.queries), first);
    float of_rows[M][2], deltas[M][2];
    load_numbers(of_rows, numbers_of(log_sum_exp, sizes.heads, place, sizes.queries), first, sizes.queries);
    load_numbers(deltas, numbers_of(delta, sizes.heads, place, sizes.queries), first, sizes.queries);
    float sums[M][PART / 8][4];
    clear(sums);
    const int seen = sizes.causal && place.first + BLOCK_Q < sizes.keys ? place.first + BLOCK_Q : sizes.keys;
    for (int key = 0, stage = 0; key < seen; key += BLOCK_K, stage ^= 1) {
        wait_for_copies();
        __syncthreads(); // this tile is there, and nobody works on the last
        if (key + BLOCK_K < seen) bring(key + BLOCK_K, stage ^ 1);
        if (PARTS == 1 && (first >= sizes.queries || (sizes.causal && key >= first + 16 * M))) continue;
#pragma unroll 1
        for (int from = 0; from < BLOCK_K; from += STEP) {
            const bf16* tile = tiles + stage * 2 * TILE + from * PITCH<D> + part;
            float p[M][N][4], ds[M][N][4];
            clear(p);
            multiply_by_rows<PITCH<D>, PART>(p, queries, tile);
            add_parts<PARTS, WARPS>(p, room);
            if (is_masked<M>(sizes, first, key + from, STEP)) mask(p, sizes, first, key + from);
            probabilities(p, sizes.scale, [&](int, int m, int half) { return of_rows[m][half]; });
            clear(ds);
            multiply_by_rows<PITCH<D>, PART>(ds, d_outs, tile + TILE);
            add_parts<PARTS, WARPS>(ds, second_room);
            through_softmax(ds, p, [&](int, int m, int half) { return deltas[m][half]; });
            unsigned a[M][N / 2][4];
            pack(a, ds);
            multiply<PITCH<D>, PART>(sums, a, tile);
        }
    }
    multiply_all(sums, sizes.scale);
    write_rows(sums, rows_of(d_q + part, sizes.d_q, place, sizes.queries), first);
}

// The rows of a warp: from `mine` of the ROWS that its block has from `first`. `room` is there for them if they stay in
// shared memory.
template <int ROWS, int THREADS, int M, int D>
__device__ inline void load_rows(InRegisters<M, D>& a, bf16*, const Rows<const bf16>& from, int first, int mine) {
    a.load(from, first + mine);
}
template <int ROWS, int THREADS, int D>
__device__ inline void load_rows(InShared<D>& a, bf16* room, const Rows<const bf16>& from, int first, int mine) {
    bring_tile<D, ROWS, THREADS>(room, from, first);
    a.tile = room + mine * PITCH<D>;
}

// The gradients of keys and values: d_v = p^T d_out, d_k = scale * d_scores^T q. Rows are keys here, columns queries:
// what is computed is the transpose of the scores, so that it is where the next products want it. Queries that do not
// exist add 0, for their rows of q and d_out, and their delta, are 0.
// Grid: batch * heads * ceil(keys / (16 M WARPS)) blocks of 32 WARPS PARTS SPLITS threads, with room for four tiles,
// four numbers per row of one and the scores of parts as above or, if A is in shared memory, the block's keys and
// values.
template <int D, int PARTS, int SPLITS, int M, int WARPS, int BLOCK_Q, int STEP, class A, class T>
__device__ inline void backward_keys(const bf16* q, const bf16* k, const bf16* v, const bf16* d_out,
                                     const float* log_sum_exp, const float* delta, T* d_k, T* d_v,
                                     const Attention& sizes) {
    constexpr int THREADS = 32 * WARPS * PARTS * SPLITS, BLOCK_K = 16 * M * WARPS, TILE = BLOCK_Q * PITCH<D>;
    constexpr int PART = D / PARTS, N = STEP / 8;
    static_assert(PARTS == 1 || SPLITS == 1, "warps are dealt one way");
    static_assert(SPLITS == 1 || 2 * BLOCK_K * D * SPLITS <= 4 * TILE, "the splits' sums fit where the tiles were");
    DYNAMIC_SHARED(bf16, tiles);
    float* const numbers = (float*)(tiles + 4 * TILE);
    float* const room = numbers + 4 * BLOCK_Q;
    float* const second_room = room + BLOCK_K * STEP * PARTS;
    const Place place = place_of(sizes.heads, sizes.keys, BLOCK_K);
    const int mine = 16 * M * (warp() % WARPS), first = place.first + mine;
    const int part = SPLITS == 1 ? warp() / WARPS * PART : 0, split = SPLITS == 1 ? 0 : warp() / WARPS;
    const auto queries = rows_of(q, sizes.q, place, sizes.queries);
    const auto d_outs = rows_of(d_out, sizes.d_out, place, sizes.queries);
    log_sum_exp = numbers_of(log_sum_exp, sizes.heads, place, sizes.queries);
    delta = numbers_of(delta, sizes.heads, place, sizes.queries);
    const auto bring = [&](int query, int stage) {
        bf16* to = tiles + stage * 2 * TILE;
        float* numbers_to = numbers + stage * 2 * BLOCK_Q;
        bring_tile<D, BLOCK_Q, THREADS>(to, queries, query);
        bring_tile<D, BLOCK_Q, THREADS>(to + TILE, d_outs, query);
        bring_numbers<BLOCK_Q, THREADS>(numbers_to, log_sum_exp, query, sizes.queries);
        bring_numbers<BLOCK_Q, THREADS>(numbers_to + BLOCK_Q, delta, query, sizes.queries);
    };
    A keys, values;
    bf16* const key_room = (bf16*)room;
    load_rows<BLOCK_K, THREADS>(keys, key_room, rows_of(k + part, sizes.k, place, sizes.keys), place.first, mine);
    load_rows<BLOCK_K, THREADS>(values, key_room + BLOCK_K * PITCH<D>, rows_of(v + part, sizes.v, place, sizes.keys),
                                place.first, mine);
    const int begin = sizes.causal ? place.first / BLOCK_Q * BLOCK_Q : 0; // queries before it see none of these keys
    bring(begin, 0);
    float key_sums[M][PART / 8][4], value_sums[M][PART / 8][4];
    clear(key_sums);
    clear(value_sums);
    for (int query = begin, stage = 0; query < sizes.queries; query += BLOCK_Q, stage ^= 1) {
        wait_for_copies();
        __syncthreads(); // this tile is there, and nobody works on the last
        if (query + BLOCK_Q < sizes.queries) bring(query + BLOCK_Q, stage ^ 1);
        if (PARTS == 1 && (first >= sizes.keys || (sizes.causal && query + BLOCK_Q <= first))) continue;
#pragma unroll 1
        for (int from = split * STEP; from < BLOCK_Q; from += SPLITS * STEP) {
            const bf16* tile = tiles + stage * 2 * TILE + from * PITCH<D> + part;
            const float* of_columns = numbers + stage * 2 * BLOCK_Q + from;
            float p[M][N][4], ds[M][N][4];
            clear(p);
            multiply_by_rows<PITCH<D>, PART>(p, keys, tile);
            add_parts<PARTS, WARPS>(p, room);
            if (sizes.causal && query + from < first + 16 * M) mask_later_keys(p, first, query + from);
            probabilities(p, sizes.scale, [&](int col, int, int) { return of_columns[col]; });
            unsigned a[M][N / 2][4];
            pack(a, p);
            multiply<PITCH<D>, PART>(value_sums, a, tile + TILE);
            clear(ds);
            multiply_by_rows<PITCH<D>, PART>(ds, values, tile + TILE);
            add_parts<PARTS, WARPS>(ds, second_room);
            through_softmax(ds, p, [&](int col, int, int) { return of_columns[BLOCK_Q + col]; });
            pack(a, ds);
            multiply<PITCH<D>, PART>(key_sums, a, tile);
        }
    }
    wait_for_copies(); // if there was no query
    if constexpr (SPLITS > 1) {
        __syncthreads(); // nobody works on tiles
        add_parts<SPLITS, WARPS>(value_sums, (float*)tiles);
        __syncthreads();
        add_parts<SPLITS, WARPS>(key_sums, (float*)tiles);
        if (split > 0) return;
    }
    write_rows(value_sums, rows_of(d_v + part, sizes.d_v, place, sizes.keys), first);
    multiply_all(key_sums, sizes.scale);
    write_rows(key_sums, rows_of(d_k + part, sizes.d_k, place, sizes.keys), first);
}

// The kernels by width of a head. Rows per block are 16 M WARPS.
#define FORWARD(D, PARTS, M, WARPS, BLOCK_K) \
    extern "C" __global__ __launch_bounds__(32 * WARPS * PARTS) void attention_forward_##D( \
        const bf16* q, const bf16* k, const bf16* v, bf16* out, float* log_sum_exp, Attention sizes) { \
        forward<D, PARTS, M, WARPS, BLOCK_K>(q, k, v, out, log_sum_exp, sizes); \
    }
#define BACKWARD_QUERIES(D, PARTS, M, WARPS, BLOCK_K, STEP) \
    extern "C" __global__ __launch_bounds__(32 * WARPS * PARTS) void attention_backward_queries_##D( \
        const bf16* q, const bf16* k, const bf16* v, const bf16* d_out, const float* log_sum_exp, const float* delta, \
        bf16* d_q, Attention sizes) { \
        backward_queries<D, PARTS, M, WARPS, BLOCK_K, STEP>(q, k, v, d_out, log_sum_exp, delta, d_q, sizes); \
    }
#define BACKWARD_KEYS(D, NAME, PARTS, SPLITS, M, WARPS, BLOCK_Q, STEP, ...) \
    extern "C" __global__ __launch_bounds__(32 * WARPS * PARTS * SPLITS) void attention_backward_##NAME##_##D( \
        const bf16* q, const bf16* k, const bf16* v, const bf16* d_out, const float* log_sum_exp, const float* delta, \
        bf16* d_k, bf16* d_v, Attention sizes) { \
        backward_keys<D, PARTS, SPLITS, M, WARPS, BLOCK_Q, STEP, __VA_ARGS__>(q, k, v, d_out, log_sum_exp, delta, \
                                                                              d_k, d_v, sizes); \
    }
FORWARD(40, 1, 2, 4, 64)
FORWARD(64, 1, 2, 4, 64)
FORWARD(80, 1, 1, 4, 64)
FORWARD(160, 1, 1, 4, 32)
FORWARD(512, 2, 1, 4, 16)
BACKWARD_QUERIES(40, 1, 2, 4, 64, 32)
BACKWARD_QUERIES(64, 1, 1, 4, 64, 64)
BACKWARD_QUERIES(80, 1, 1, 4, 64, 64)
BACKWARD_QUERIES(160, 1, 1, 4, 32, 32)
BACKWARD_QUERIES(512, 4, 1, 2, 16, 16)
BACKWARD_KEYS(40, keys, 1, 1, 2, 4, 64, 32, InRegisters<2, 40>)
BACKWARD_KEYS(64, keys, 1, 1, 1, 4, 64, 64, InRegisters<1, 64>)
BACKWARD_KEYS(80, keys, 1, 1, 1, 4, 64, 32, InRegisters<1, 80>)
BACKWARD_KEYS(160, keys, 1, 1, 1, 2, 16, 16, InShared<160>)
BACKWARD_KEYS(512, keys, 4, 1, 1, 2, 16, 16, InRegisters<1, 128>)
// For 128 keys and fewer.
BACKWARD_KEYS(40, few_keys, 1, 4, 1, 1, 128, 32, InRegisters<1, 40>)
BACKWARD_KEYS(64, few_keys, 1, 4, 1, 1, 64, 16, InRegisters<1, 64>)
BACKWARD_KEYS(80, few_keys, 1, 4, 1, 1, 64, 16, InRegisters<1, 80>)

#endif
