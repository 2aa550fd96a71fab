// The CUDA language for a host compiler: what a kernel file needs to be compiled by g++ unchanged.
//
// A kernel's threads are fibres that the scheduler (threads.cpp) runs one at a time, so the built-in variables are
// plain globals and a block's shared memory is static. The compiler reports every access to memory (-fsanitize=thread,
// with memory.cpp in place of its runtime), which is how overruns, races and reads of unwritten memory are found.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict
// Filled anew for every block, so that nothing can be read that the block has not written.
#define __shared__ static
// For `extern __shared__ type name[]`, the memory that a launch asks for, which no host compiler takes as it stands.
#define DYNAMIC_SHARED(type, name) type* const name = (type*)software_dynamic_shared

enum { warpSize = 32, SOFTWARE_SLOT = 64 };
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
extern "C" {
extern dim3 threadIdx, blockIdx, blockDim, gridDim;
extern char software_dynamic_shared[];

// Threads that call these wait for one another; `line` is that of the call.
int software_barrier(int value, int line); // the sum of `value`
// What each of the 32 lanes gave, SOFTWARE_SLOT bytes apart, until this lane's next call.
const void* software_warp(unsigned mask, const void* mine, size_t bytes, int line);

// What mma.cuh has in PTX, for the software device: mma with `depth` columns of A, ldmatrix, cp.async and its wait_all.
void software_mma(float* c, const unsigned* a, const unsigned* b, int depth, int line);
void software_load_matrices(unsigned* r, const void* row, int count, bool transposed, int line);
void software_begin_copy(void* to, const void* from, size_t bytes, bool valid);
void software_end_copies();
}

inline void __syncthreads(int line = __builtin_LINE()) { software_barrier(0, line); }
inline int __syncthreads_count(int predicate, int line = __builtin_LINE()) {
    return software_barrier(predicate != 0, line);
}
inline int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
    return software_barrier(predicate != 0, line) > 0;
}
inline int __syncthreads_and(int predicate, int line = __builtin_LINE()) {
    return software_barrier(predicate == 0, line) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
    software_warp(mask, nullptr, 0, line);
}

inline unsigned software_lane() {
    return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % warpSize;
}

// The value of lane `from`; of a lane that is not in `mask`, which CUDA leaves undefined, bytes of ones.
template <class T> inline T software_shuffle(unsigned mask, T value, unsigned from, int line) {
    return *(const T*)((const char*)software_warp(mask, &value, sizeof value, line) + from % warpSize * SOFTWARE_SLOT);
}
template <class T> inline T __shfl_sync(unsigned mask, T v, int from, int width = 32, int line = __builtin_LINE()) {
    unsigned lane = software_lane();
    return software_shuffle(mask, v, lane / width * width + unsigned(from) % width, line);
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, int line = __builtin_LINE()) {
    unsigned lane = software_lane(), from = lane ^ unsigned(bits);
    return software_shuffle(mask, v, from / width > lane / width ? lane : from, line);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32, int line = __builtin_LINE()) {
    unsigned lane = software_lane();
    return software_shuffle(mask, v, lane % width + by < unsigned(width) ? lane + by : lane, line);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32, int line = __builtin_LINE()) {
    unsigned lane = software_lane();
    return software_shuffle(mask, v, lane % width >= by ? lane - by : lane, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    const char* all = (const char*)software_warp(mask, &predicate, sizeof predicate, line);
    unsigned votes = 0;
    for (int lane = 0; lane < warpSize; ++lane) {
        votes |= unsigned((mask >> lane & 1) && *(const int*)(all + lane * SOFTWARE_SLOT)) << lane;
    }
    return votes;
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return __ballot_sync(mask, predicate, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return __ballot_sync(mask, predicate, line) == mask;
}

template <class To, class From> inline To software_bits(From v) {
    static_assert(sizeof(To) == sizeof(From), "one size");
    To r;
    memcpy(&r, &v, sizeof r);
    return r;
}
inline float __uint_as_float(unsigned v) { return software_bits<float>(v); }
inline unsigned __float_as_uint(float v) { return software_bits<unsigned>(v); }
inline float __int_as_float(int v) { return software_bits<float>(v); }
inline int __float_as_int(float v) { return software_bits<int>(v); }
inline float rsqrtf(float v) { return 1.0f / sqrtf(v); }
template <class T> inline T __ldg(const T* p) { return *p; }
using std::isfinite;
using std::isinf;
using std::isnan;

// How the driver finds a kernel file's kernels: an array `software_cuda_kernels`, ended by an empty entry.
struct SoftwareParameter {
    unsigned bytes;
    bool is_pointer, is_const;
};
struct SoftwareKernel {
    const char* name;
    void (*call)(void** arguments);
    const SoftwareParameter* parameters;
    unsigned count;
};
template <class T> constexpr SoftwareParameter software_parameter() {
    using Target = std::remove_pointer_t<T>;
    return {unsigned(sizeof(T)), std::is_pointer_v<T>, std::is_const_v<Target>};
}
template <auto F> struct SoftwareCall;
template <class... T, void (*F)(T...)> struct SoftwareCall<F> {
    static constexpr SoftwareParameter parameters[] = {software_parameter<T>()...};
    template <size_t... I> static void unpack(void** p, std::index_sequence<I...>) { F(*(T*)p[I]...); }
    static void call(void** p) { unpack(p, std::index_sequence_for<T...>()); }
    static constexpr SoftwareKernel entry(const char* name) { return {name, call, parameters, sizeof...(T)}; }
};
#define SOFTWARE_KERNEL(name) SoftwareCall<name>::entry(#name)
