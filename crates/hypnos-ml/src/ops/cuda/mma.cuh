// Tensor cores, and copies that go past the registers: the instructions that CUDA C++ has no words for. All inline PTX
// is in this file. The software device (tests/software_cuda) has another implementation of each function.
//
// Needs compute capability 8.0. The sections named are those of NVIDIA's "PTX ISA 9.0".
//
// A warp multiplies A (16 x 16, or 16 x 8) by B (16 x 8, or 8 x 8) and adds the product to C (16 x 8). Each lane holds
// a part, two bf16 in each register of A and B ("Matrix Fragments for mma.m16n8k16 with floating point type", and the
// same for m16n8k8). With row = lane / 4 and col = lane % 4 * 2:
//
//   A  a[0] (row, col..col + 1)  a[1] (row + 8, col..)  a[2] (row, col + 8..)  a[3] (row + 8, col + 8..)
//   B  b[0] (col..col + 1, row)  b[1] (col + 8.., row)
//   C  c[0] (row, col)  c[1] (row, col + 1)  c[2] (row + 8, col)  c[3] (row + 8, col + 1)
//
// Hence C's registers of two products that lie side by side are, rounded to bf16, those of an A. The smaller shapes
// have the first half of the registers of A and B.
#pragma once
#include "common.cuh"

#ifdef __CUDACC__

// The shared memory that a launch asks for.
#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]

__device__ inline unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

// c += a b ("Multiply-and-Accumulate Instruction: mma").
__device__ inline void mma_16x8x16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void mma_16x8x8(float (&c)[4], const unsigned (&a)[4], unsigned b0) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b0));
}

// Matrices of 8 x 8 from shared memory ("Warp-level matrix load instruction: ldmatrix"). Lane 8 j + i gives the address
// of row i of matrix j, 16 bytes, and gets of each matrix the elements (row, col..col + 1) in r[j]; (col..col + 1, row)
// if transposed.
__device__ inline void load_4_matrices(unsigned (&r)[4], const bf16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ inline void load_4_transposed(unsigned (&r)[4], const bf16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ inline void load_2_transposed(unsigned (&r)[4], const bf16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

// Begins to copy 16 or 4 bytes to shared memory, or zeros, whatever `from` is, if not `valid` ("Data Movement and
// Conversion Instructions: cp.async"). They are there after wait_for_copies, for other threads after a barrier that
// follows it.
__device__ inline void copy_16_bytes(void* to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ inline void copy_4_bytes(void* to, const void* from, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(valid ? 4 : 0)
                 : "memory");
}
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Two numbers as bf16, the first in the lower half. To nearest, ties to even ("cvt").
__device__ inline unsigned pack_bf16(float first, float second) {
    unsigned r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(second), "f"(first));
    return r;
}

// 2^v, off by 2 units in the last place at most; less than 2^-126 is 0 ("ex2").
__device__ inline float exp2_fast(float v) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}

#else

inline void mma_16x8x16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, int line = __builtin_LINE()) {
    const unsigned b[2] = {b0, b1};
    software_mma(c, a, b, 16, line);
}
inline void mma_16x8x8(float (&c)[4], const unsigned (&a)[4], unsigned b0, int line = __builtin_LINE()) {
    software_mma(c, a, &b0, 8, line);
}
inline void load_4_matrices(unsigned (&r)[4], const bf16* row, int line = __builtin_LINE()) {
    software_load_matrices(r, row, 4, false, line);
}
inline void load_4_transposed(unsigned (&r)[4], const bf16* row, int line = __builtin_LINE()) {
    software_load_matrices(r, row, 4, true, line);
}
inline void load_2_transposed(unsigned (&r)[4], const bf16* row, int line = __builtin_LINE()) {
    software_load_matrices(r, row, 2, true, line);
}
inline void copy_16_bytes(void* to, const void* from, bool valid) { software_begin_copy(to, from, 16, valid); }
inline void copy_4_bytes(void* to, const void* from, bool valid) { software_begin_copy(to, from, 4, valid); }
inline void wait_for_copies() { software_end_copies(); }
inline unsigned pack_bf16(float first, float second) {
    return to_bf16(first).bits | (unsigned)to_bf16(second).bits << 16;
}
inline float exp2_fast(float v) { return exp2f(v); }

#endif
