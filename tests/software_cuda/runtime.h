// What the parts of the software device share. libcuda.so.1 holds it; the libraries above it are linked to that.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace software {

// What is running, for messages and counters: the kernel or the library call.
void begin(const std::string& what);
const std::string& running();

// Says on stderr what went wrong in what is running. Within a kernel it does not return: the launch is given up.
void fail(const void* program_counter, const char* format, ...) __attribute__((format(printf, 2, 3)));
// Leaves the kernel that is running, if one is.
void give_up();
// The running thread as text: "block 3, thread 17".
std::string who();

// Memory of the device. Addresses are the host's own.
void* allocate(size_t bytes); // null if there is no room
bool release(void* address);
size_t allocated();
// Where the allocation that holds `address` ends; 0 if none does.
uint64_t end_of(uint64_t address);

enum Access { READ, WRITE };
// Whether a library or a copy may access these bytes: they must be allocated and, to be read, written before. Says so
// if not. What is written counts as written, and the bytes count for what is running.
bool check(const void* address, size_t bytes, Access access);
// The same for `columns` runs of `bytes`, one every `pitch` bytes, counted once each.
bool check_runs(const void* address, size_t bytes, size_t columns, size_t pitch, Access access);

// An access of the running thread, as the compiler reports those that it sees.
void touch(const void* address, size_t bytes, Access access, const void* program_counter);
// The same of a thread that will write later, but anywhere from now on: until then nobody finds anything there.
void begin_write(void* address, size_t bytes, const void* program_counter);
// Whether the memory is of the running block.
bool is_shared(const void* address);

// Before a kernel's first block, and before each block: what shared memory held is gone, and what came before is
// forgotten. Races in global memory are looked for if `with_races`.
void new_launch(uint64_t shared_address, size_t shared_bytes, size_t dynamic_bytes, bool with_races);
void new_block();

// Record instead of compute (SOFTWARE_CUDA_RECORD=1): launches and calls are counted by their operands, nothing is run,
// no memory is touched, and what is copied to the host is zeros.
bool recording();

// Counts bytes for what is running. The driver's profiler functions say from where to where anything is counted.
void add(Access access, uint64_t bytes);
void count_from_here();
void count_no_more();

// Held around everything that runs: the device does one thing at a time.
struct Lock {
    Lock();
    ~Lock();
};

struct Launch {
    void (*call)(void**);
    void** arguments;
    unsigned grid[3], block[3];
};
// Runs every block; false if something was found.
bool run(const Launch& launch);

// The running thread, as the race detector wants it.
struct Self {
    uint32_t thread; // number within the launch
    uint32_t block;
    uint32_t first; // thread of its block
    uint32_t warp;  // within its block
    uint32_t clock; // of its warp: one more after every barrier
};
extern Self self;
extern bool in_kernel;
extern uint32_t block_threads;
// The clock of each warp of this block at its last __syncthreads: what came before is ordered before all that comes
// now.
extern uint32_t ordered_before[];

} // namespace software
