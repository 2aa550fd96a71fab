// Runs the threads of a block as fibres, one at a time, in an order drawn from SOFTWARE_CUDA_SEED: each until it ends
// or waits for others, at a barrier or within its warp. Blocks come one after the other, in an order drawn likewise.
#include "device.h"
#include "runtime.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <random>
#include <sys/mman.h>
#include <vector>

extern "C" {
dim3 threadIdx, blockIdx, blockDim, gridDim;
}

namespace software {
Self self;
bool in_kernel;
uint32_t block_threads;
uint32_t ordered_before[1024 / warpSize];

namespace {

// A little more than a power of two, so that the stacks do not all meet in the same lines of the cache.
constexpr size_t STACK_BYTES = (128 << 10) + 13 * 64, MOST_THREADS = 1024;

#if defined(__x86_64__)
// Saves what a called function must keep, and goes on with the other stack.
extern "C" void software_switch(void** from, void* to);
asm(R"(
.text
.type software_switch,@function
software_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size software_switch,.-software_switch
)");
using Context = void*;
void go(Context& from, Context& to) { software_switch(&from, to); }
void make(Context& context, char* stack, void (*entry)()) {
    void** top = (void**)(stack + STACK_BYTES) - 1; // as at a function's entry: a multiple of 16, less 8
    *--top = (void*)entry;
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    context = top;
}
#else
} // namespace
} // namespace software
#include <ucontext.h>
namespace software {
namespace {
using Context = ucontext_t;
void go(Context& from, Context& to) { swapcontext(&from, &to); }
void make(Context& context, char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = STACK_BYTES;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}
#endif

enum What { NEW, READY, AT_BARRIER, IN_WARP, DONE };
struct Fibre {
    Context context;
    What state;
    char* stack;
    int line; // where it waits
};
// A copy to shared memory that a thread has begun and not waited for.
struct Copy {
    void* to;
    const void* from;
    size_t bytes;
    bool valid;
    const void* program_counter;
};
struct Slot {
    alignas(16) char bytes[SOFTWARE_SLOT];
};
struct Warp {
    unsigned arrived, mask;
    int parity, line;
    uint32_t clock;
    Slot slots[2][warpSize];
};

std::vector<Fibre> fibres(MOST_THREADS);
std::vector<Warp> warps(MOST_THREADS / warpSize);
std::vector<std::vector<Copy>> copies(MOST_THREADS);
std::vector<char*> stacks;
std::vector<uint32_t> order;
Context scheduler;
uint32_t running_thread, waiting;
int barrier_sum, barrier_result, barrier_line;
bool failed;
const Launch* launch;

char* take_stack() {
    if (stacks.empty()) {
        void* all = mmap(nullptr, STACK_BYTES * MOST_THREADS, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (all == MAP_FAILED) abort();
        for (size_t i = MOST_THREADS; i-- > 0;) stacks.push_back((char*)all + i * STACK_BYTES);
    }
    char* stack = stacks.back();
    stacks.pop_back();
    return stack;
}

void place(uint32_t thread) {
    running_thread = thread;
    if (blockDim.x == block_threads) {
        threadIdx.x = thread;
    } else {
        threadIdx = {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / blockDim.x / blockDim.y};
    }
    self.thread = self.first + thread;
    self.warp = thread / warpSize;
    self.clock = warps[self.warp].clock;
}

void fibre_main() {
    launch->call(launch->arguments);
    if (!copies[running_thread].empty()) fail(nullptr, "ends without waiting for what it copies");
    fibres[running_thread].state = DONE;
    go(fibres[running_thread].context, scheduler);
    abort();
}

void resume(uint32_t thread) {
    Fibre& fibre = fibres[thread];
    if (fibre.state == NEW) {
        fibre.stack = take_stack();
        make(fibre.context, fibre.stack, fibre_main);
    }
    fibre.state = READY;
    place(thread);
    in_kernel = true;
    go(scheduler, fibre.context);
    in_kernel = false;
    if (fibre.state == DONE || failed) stacks.push_back(fibre.stack);
}

void wait(What why, int line) {
    Fibre& fibre = fibres[running_thread];
    fibre.state = why;
    fibre.line = line;
    go(fibre.context, scheduler);
}

// All that have not ended are at the barrier.
bool pass_barrier() {
    for (uint32_t t = 0; t < block_threads; ++t) {
        Fibre& fibre = fibres[t];
        if (fibre.state != AT_BARRIER) continue;
        if (fibre.line != barrier_line) {
            fail(nullptr, "block %u: threads of one block wait at the barriers of lines %d and %d", self.block,
                 barrier_line, fibre.line);
            return false;
        }
        fibre.state = READY;
    }
    for (size_t w = 0; w < warps.size(); ++w) ordered_before[w] = ++warps[w].clock;
    barrier_result = barrier_sum;
    barrier_sum = 0;
    waiting = 0;
    return true;
}

// Nobody can go on.
void explain_deadlock() {
    for (uint32_t t = 0; t < block_threads; ++t) {
        const Fibre& fibre = fibres[t];
        if (fibre.state != IN_WARP) continue;
        const Warp& warp = warps[t / warpSize];
        fail(nullptr, "block %u: warp %u waits at line %d for lanes %#x, of which only %#x come", self.block,
             t / warpSize, warp.line, warp.mask, warp.arrived);
        return;
    }
    fail(nullptr, "block %u: its threads wait for ever", self.block);
}

void run_block() {
    uint32_t alive = block_threads;
    for (uint32_t t = 0; t < block_threads; ++t) {
        fibres[t].state = NEW;
        copies[t].clear();
    }
    for (uint32_t w = 0; w * warpSize < block_threads; ++w) {
        warps[w].arrived = 0;
        ordered_before[w] = warps[w].clock = 0;
    }
    waiting = 0, barrier_sum = 0;
    new_block();
    while (alive > 0 && !failed) {
        bool any = false;
        for (uint32_t t : order) {
            if (fibres[t].state != NEW && fibres[t].state != READY) continue;
            any = true;
            resume(t);
            if (failed) return;
            alive -= fibres[t].state == DONE;
        }
        if (alive > 0 && waiting == alive) {
            failed = !pass_barrier();
        } else if (!any) {
            explain_deadlock();
            failed = true;
        }
    }
}

void give_stacks_back() {
    for (uint32_t t = 0; t < block_threads; ++t) {
        Fibre& fibre = fibres[t];
        if (fibre.state == AT_BARRIER || fibre.state == IN_WARP) stacks.push_back(fibre.stack);
    }
}

std::mt19937& generator() {
    static std::mt19937 generator = [] {
        const char* seed = getenv("SOFTWARE_CUDA_SEED");
        return std::mt19937(seed ? atoi(seed) : 0);
    }();
    return generator;
}

} // namespace

std::string who() { return "block " + std::to_string(self.block) + ", thread " + std::to_string(running_thread); }

void give_up() {
    failed = true;
    go(fibres[running_thread].context, scheduler);
    abort();
}

bool run(const Launch& what) {
    launch = &what;
    failed = false;
    gridDim = {what.grid[0], what.grid[1], what.grid[2]};
    blockDim = {what.block[0], what.block[1], what.block[2]};
    threadIdx = {0, 0, 0};
    block_threads = blockDim.x * blockDim.y * blockDim.z;
    const uint32_t blocks = gridDim.x * gridDim.y * gridDim.z;
    order.resize(block_threads);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), generator());
    const uint32_t first = generator()() % blocks;
    const bool backwards = generator()() % 2;
    for (uint32_t i = 0; i < blocks && !failed; ++i) {
        self.block = uint32_t((uint64_t(first) + (backwards ? blocks - i : i)) % blocks);
        self.first = self.block * block_threads;
        blockIdx.x = self.block % gridDim.x;
        blockIdx.y = self.block / gridDim.x % gridDim.y;
        blockIdx.z = self.block / gridDim.x / gridDim.y;
        run_block();
    }
    if (failed) give_stacks_back();
    return !failed;
}

} // namespace software

using namespace software;

int software_barrier(int value, int line) {
    if (waiting++ == 0) barrier_line = line;
    barrier_sum += value;
    wait(AT_BARRIER, line);
    return barrier_result;
}

const void* software_warp(unsigned mask, const void* mine, size_t bytes, int line) {
    const uint32_t thread = running_thread, lane = thread % warpSize;
    Warp& warp = warps[thread / warpSize];
    const void* pc = __builtin_return_address(0);
    if (bytes > sizeof(Slot)) fail(pc, "exchanges %zu bytes at once; most are %zu", bytes, sizeof(Slot));
    if (!(mask >> lane & 1)) fail(pc, "calls a warp function whose mask %#x leaves it out, at line %d", mask, line);
    if (warp.arrived == 0) {
        warp.mask = mask, warp.line = line;
        if (mask != 0xffffffffu) memset(warp.slots[warp.parity], 0xff, sizeof warp.slots[0]);
    } else if (warp.mask != mask || warp.line != line) {
        fail(pc, "calls a warp function with mask %#x at line %d while others wait with mask %#x at line %d", mask,
             line, warp.mask, warp.line);
    }
    // The others may be one call ahead, never two: hence two sets of slots.
    Slot* slots = warp.slots[warp.parity];
    if (bytes) memcpy(slots[lane].bytes, mine, bytes);
    warp.arrived |= 1u << lane;
    if (warp.arrived == mask) {
        warp.arrived = 0, warp.parity ^= 1;
        if (!bytes) self.clock = ++warp.clock; // __syncwarp orders memory; a shuffle does not
        for (uint32_t other = 0; other < warpSize; ++other) {
            if (mask >> other & 1) fibres[thread - lane + other].state = READY;
        }
    } else {
        wait(IN_WARP, line);
    }
    return slots;
}

namespace {
float half_of(unsigned r, unsigned which) { return software_bits<float>(which ? r & 0xffff0000u : r << 16); }
} // namespace

// The layout is that of "Matrix Fragments for mma.m16n8k16 with floating point type" in NVIDIA's "PTX ISA 9.0", seen
// from the matrices: element (i, k) of A is in lane i % 8 * 4 + k % 8 / 2. A GPU's sums may round otherwise.
void software_mma(float* c, const unsigned* a, const unsigned* b, int depth, int line) {
    struct Given {
        unsigned a[4], b[2];
    } mine = {};
    static_assert(sizeof mine <= SOFTWARE_SLOT, "one exchange");
    memcpy(mine.a, a, depth / 4 * sizeof(unsigned));
    memcpy(mine.b, b, depth / 8 * sizeof(unsigned));
    const Slot* all = (const Slot*)software_warp(0xffffffffu, &mine, sizeof mine, line);
    const auto given = [&](unsigned lane) -> const Given& { return *(const Given*)all[lane].bytes; };
    const unsigned lane = running_thread % warpSize, row = lane / 4, col = lane % 4 * 2;
    float left[2][16], right[2][16]; // the rows of A, row and row + 8, and the columns of B that this lane needs
    for (unsigned k = 0; k < unsigned(depth); ++k) {
        const unsigned holder = k % 8 / 2;
        for (unsigned half = 0; half < 2; ++half) {
            left[half][k] = half_of(given(row * 4 + holder).a[k / 8 * 2 + half], k % 2);
            right[half][k] = half_of(given((col + half) * 4 + holder).b[k / 8], k % 2);
        }
    }
    for (unsigned which = 0; which < 4; ++which) {
        double sum = c[which];
        for (unsigned k = 0; k < unsigned(depth); ++k) sum += (double)left[which / 2][k] * right[which % 2][k];
        c[which] = float(sum);
    }
}

void software_load_matrices(unsigned* r, const void* row, int count, bool transposed, int line) {
    const void* pc = __builtin_return_address(0);
    const unsigned lane = running_thread % warpSize;
    uint16_t mine[8] = {};
    if (lane < 8 * unsigned(count)) { // the other lanes' addresses are not looked at
        if (!is_shared(row)) fail(pc, "loads a matrix from what is not shared memory");
        touch(row, sizeof mine, READ, pc);
        memcpy(mine, row, sizeof mine);
    }
    const Slot* all = (const Slot*)software_warp(0xffffffffu, mine, sizeof mine, line);
    const auto element = [&](unsigned i, unsigned j) -> unsigned { return ((const uint16_t*)all[i].bytes)[j]; };
    const unsigned i = lane / 4, j = lane % 4 * 2;
    for (unsigned which = 0; which < unsigned(count); ++which) {
        const unsigned first = 8 * which;
        r[which] = transposed ? element(first + j, i) | element(first + j + 1, i) << 16
                              : element(first + i, j) | element(first + i, j + 1) << 16;
    }
}

// A GPU copies at any time between the two calls: nothing can be read there from the first on, and what is copied is
// read at the second.
void software_begin_copy(void* to, const void* from, size_t bytes, bool valid) {
    const void* pc = __builtin_return_address(0);
    if (!is_shared(to)) fail(pc, "copies to what is not shared memory");
    begin_write(to, bytes, pc);
    copies[running_thread].push_back({to, from, bytes, valid, pc});
}

void software_end_copies() {
    for (const Copy& copy : copies[running_thread]) {
        if (copy.valid) touch(copy.from, copy.bytes, READ, copy.program_counter);
        touch(copy.to, copy.bytes, WRITE, copy.program_counter);
        if (copy.valid) {
            memcpy(copy.to, copy.from, copy.bytes);
        } else {
            memset(copy.to, 0, copy.bytes);
        }
    }
    copies[running_thread].clear();
}
