// Two tensors joined row by row, and the way back. A row of the whole is a row of a, `n_a` elements, and then one of b.
#include "common.cuh"

// y = [a, b], n elements of y. Any grid.
extern "C" __global__ void concat(const real* a, const real* b, real* y, long long n, int n_a, int n_b) {
    const int cols = n_a + n_b;
    if (n_a % 4 == 0 && n_b % 4 == 0 && is_aligned(a) && is_aligned(b) && is_aligned(y)) {
        for (long long i = 4 * thread_index(); i < n; i += 4 * thread_count()) {
            const long long row = i / cols, col = i % cols;
            store4(y + i, col < n_a ? load4(a + row * n_a + col) : load4(b + row * n_b + col - n_a));
        }
        return;
    }
    for (long long i = thread_index(); i < n; i += thread_count()) {
        const long long row = i / cols, col = i % cols;
        store(y + i, col < n_a ? load(a + row * n_a + col) : load(b + row * n_b + col - n_a));
    }
}

// [da, db] = dy, n elements of dy. Either may be null: nobody wants it. Any grid.
extern "C" __global__ void concat_bwd(const real* dy, real* da, real* db, long long n, int n_a, int n_b) {
    const int cols = n_a + n_b;
    const bool wide = n_a % 4 == 0 && n_b % 4 == 0 && is_aligned(dy) && is_aligned(da) && is_aligned(db);
    const int step = wide ? 4 : 1;
    for (long long i = step * thread_index(); i < n; i += step * thread_count()) {
        const long long row = i / cols, col = i % cols;
        real* const to = col < n_a ? (da ? da + row * n_a + col : nullptr) : (db ? db + row * n_b + col - n_a : nullptr);
        if (!to) continue;
        if (wide) {
            store4(to, load4(dy + i));
        } else {
            store(to, load(dy + i));
        }
    }
}
