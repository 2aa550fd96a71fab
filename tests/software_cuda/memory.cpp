// The device's memory: a range of addresses of the host, with shadows that say of every byte whether it is allocated
// and written, and who read and wrote it last. Kernels are compiled with -fsanitize=thread and this file has the
// functions that the compiler calls before each access; GCC's own runtime is not linked.
#include "runtime.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <map>
#include <mutex>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

extern "C" {
alignas(1024) char software_dynamic_shared[163 << 10];
}

namespace software {
namespace {

constexpr uint64_t SPAN = 1ull << 40, PAGE = 4096;
// Between two allocations lies at least this much, or as much as the first holds: a wrong index lands in nothing.
constexpr uint64_t LEAST_GAP = 1 << 16, MOST_GAP = 1 << 30;
constexpr size_t MOST_DYNAMIC = sizeof software_dynamic_shared;

enum State : uint8_t { FREE, UNWRITTEN, WRITTEN };

// An access: thread (32 bits), launch (16), clock of its warp (16). 0 is none: launches count from 1.
using Record = uint64_t;
struct Cell {
    Record write, read[2];
};
// Global memory has a cell for two bytes, the least that a float needs; 1-byte accesses are not looked at for races.
constexpr uint64_t GRANULE = 2;

char* base;
uint8_t* states;
Cell* cells;
std::map<uint64_t, uint64_t> allocations; // from offset to size
uint64_t cursor = LEAST_GAP, in_use, peak;
uint16_t launch;
bool global_races;

// What the threads of a block share: the static variables of a kernel file, and what the launch asks for.
struct Shared {
    uint64_t base = 0;
    size_t size = 0;
    std::vector<uint8_t> states;
    std::vector<Cell> cells;
} fixed, dynamic;

std::string current;
struct Count {
    uint64_t calls = 0, bytes_read = 0, bytes_written = 0;
};
std::map<std::string, Count> counts;
Count* counter; // what is running counts here, if anything is counted
bool counting = true;
std::recursive_mutex mutex;

void* reserve(uint64_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
        perror("software CUDA: reserving addresses");
        abort();
    }
    madvise(p, bytes, MADV_NOHUGEPAGE); // allocations are small and far apart
    return p;
}

void prepare() {
    if (base) return;
    base = (char*)reserve(SPAN);
    states = (uint8_t*)reserve(SPAN);
    cells = (Cell*)reserve(SPAN / GRANULE * sizeof(Cell));
}

uint64_t pages(uint64_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }
uint64_t gap_after(uint64_t bytes) {
    return bytes < LEAST_GAP ? LEAST_GAP : bytes < MOST_GAP ? pages(bytes) : MOST_GAP;
}

// The first place from `at` on where `bytes` fit with their gap, or SPAN.
uint64_t place_from(uint64_t at, uint64_t bytes) {
    while (at + bytes + gap_after(bytes) <= SPAN) {
        auto after = allocations.lower_bound(at);
        if (after == allocations.end() || after->first >= at + bytes + gap_after(bytes)) return at;
        at = after->first + pages(after->second) + gap_after(after->second);
    }
    return SPAN;
}

std::string described(uint64_t offset) {
    char text[128];
    auto after = allocations.upper_bound(offset);
    if (after == allocations.begin()) return "before all allocations";
    auto [start, size] = *std::prev(after);
    if (offset < start + size) {
        snprintf(text, sizeof text, "byte %lu of an allocation of %lu", offset - start, size);
    } else if (after != allocations.end() && after->first - offset < offset - start - size) {
        snprintf(text, sizeof text, "%lu bytes before an allocation of %lu", after->first - offset, after->second);
    } else {
        snprintf(text, sizeof text, "%lu bytes behind an allocation of %lu", offset - start - size, size);
    }
    return text;
}

std::string described(const Shared& shared, uint64_t offset) {
    const char* kind = &shared == &dynamic ? " of the launch's " : " of the kernel's ";
    return "byte " + std::to_string(offset) + kind + std::to_string(shared.size) + " of shared memory";
}

bool all_written(const uint8_t* s, size_t n) { return s[0] == WRITTEN && memcmp(s, s + 1, n - 1) == 0; }

// The same for what most accesses read, 1 to 16 bytes.
template <size_t N> bool all_written(const uint8_t* s) {
    uint8_t wanted[N];
    memset(wanted, WRITTEN, N);
    return memcmp(s, wanted, N) == 0;
}
template <size_t N> bool none_free(const uint8_t* s) {
    uint8_t least = WRITTEN;
    for (size_t i = 0; i < N; ++i) least = s[i] < least ? s[i] : least;
    return least != FREE;
}

uint32_t thread_of(Record r) { return uint32_t(r >> 32); }
uint16_t launch_of(Record r) { return uint16_t(r >> 16); }
uint16_t clock_of(Record r) { return uint16_t(r); }

// Whether what was recorded happened before what the running thread does now.
bool ordered(Record r, bool is_shared) {
    if (launch_of(r) != launch || thread_of(r) == self.thread) return true;
    const uint32_t within = thread_of(r) - self.first;
    if (within >= block_threads) return is_shared;
    if (within / 32 == self.warp) return clock_of(r) < self.clock;
    return clock_of(r) < ordered_before[within / 32];
}

// The warp of the running thread's block that made the record, or NO_WARP if another block did.
constexpr uint32_t NO_WARP = ~0u;
uint32_t warp_of(Record r) {
    const uint32_t within = thread_of(r) - self.first;
    return within < block_threads ? within / 32 : NO_WARP;
}

// Keeps the running thread as a reader of the cell, in place of one that read before it. If there is none, two of the
// three readers are kept: of different blocks if possible, else of different warps. That is enough: __syncthreads
// orders a later write only after the readers of its own block, and __syncwarp only after those of its own warp, so a
// write that is not ordered after all readers is not ordered after one of these two.
void remember_reader(Cell& cell, Record me, bool is_shared) {
    for (Record& reader : cell.read) {
        if (ordered(reader, is_shared)) {
            reader = me;
            return;
        }
    }
    // If these are equal, both kept readers are of one warp, or both of other blocks than the running thread.
    if (warp_of(cell.read[0]) == warp_of(cell.read[1])) cell.read[1] = me;
}

template <Access A> void note(Cell& cell, const Shared* shared, uint64_t offset, size_t bytes, const void* pc) {
    const Record me = uint64_t(self.thread) << 32 | uint64_t(launch) << 16 | uint16_t(self.clock);
    Record other = ordered(cell.write, shared) ? 0 : cell.write;
    if (A == WRITE) {
        for (Record reader : cell.read) {
            if (!other && !ordered(reader, shared)) other = reader;
        }
    }
    if (other) {
        const char* what = other == cell.write ? "written" : "read";
        fail(pc, "%s %zu bytes at %s that thread %u of block %u has %s, without a barrier in between",
             A == READ ? "reads" : "writes", bytes, (shared ? described(*shared, offset) : described(offset)).c_str(),
             thread_of(other) % block_threads, thread_of(other) / block_threads, what);
    }
    if (A == WRITE) {
        cell.write = me;
    } else {
        remember_reader(cell, me, shared);
    }
}

template <Access A> [[gnu::noinline]] void refuse(const uint8_t* s, uint64_t offset, size_t bytes, const void* pc) {
    size_t bad = 0;
    while (bad < bytes && (A == READ ? s[bad] == WRITTEN : s[bad] != FREE)) ++bad;
    fail(pc, "%s %zu bytes at %s, %s", A == READ ? "reads" : "writes", bytes, described(offset + bad).c_str(),
         s[bad] == FREE ? "which are not allocated" : "which were never written");
}

// An access of N bytes, or of any number if N is 0.
template <Access A, size_t N> void access_global(uint64_t offset, size_t n, const void* pc) {
    const size_t bytes = N ? N : n;
    uint8_t* s = states + offset;
    bool fine;
    if constexpr (N == 0) {
        fine = A == READ ? all_written(s, n) : memchr(s, FREE, n) == nullptr;
    } else {
        fine = A == READ ? all_written<N>(s) : none_free<N>(s);
    }
    if (!fine) refuse<A>(s, offset, bytes, pc);
    if (A == WRITE) memset(s, WRITTEN, bytes);
    add(A, bytes);
    if (!global_races || bytes < GRANULE) return;
    for (uint64_t g = offset / GRANULE; g * GRANULE < offset + bytes; ++g)
        note<A>(cells[g], nullptr, offset, bytes, pc);
}

template <Access A> void access_shared(Shared& shared, uint64_t offset, size_t bytes, const void* pc) {
    uint8_t* s = shared.states.data() + offset;
    if (offset + bytes > shared.size || (A == READ && !all_written(s, bytes))) {
        fail(pc, "%s %zu bytes at %s, %s", A == READ ? "reads" : "writes", bytes, described(shared, offset).c_str(),
             offset + bytes > shared.size ? "which end too soon" : "which this block has not written");
    }
    if (A == WRITE) memset(s, WRITTEN, bytes);
    for (size_t i = 0; i < bytes; ++i) note<A>(shared.cells[offset + i], &shared, offset, bytes, pc);
}

template <Access A, size_t N> inline void access(const void* address, size_t n, size_t alignment, const void* pc) {
    if (!in_kernel) return;
    const size_t bytes = N ? N : n;
    const uint64_t at = uint64_t(address), offset = at - uint64_t(base);
    if (at % alignment) {
        fail(pc, "%s %zu bytes at an address that is not a multiple of %zu", A == READ ? "reads" : "writes", bytes,
             alignment);
    }
    if (offset < SPAN) {
        access_global<A, N>(offset, bytes, pc);
    } else if (at - fixed.base < fixed.size) {
        access_shared<A>(fixed, at - fixed.base, bytes, pc);
    } else if (at - dynamic.base < MOST_DYNAMIC) {
        access_shared<A>(dynamic, at - dynamic.base, bytes, pc);
    } else if (at < PAGE) {
        fail(pc, "%s %zu bytes at address 0", A == READ ? "reads" : "writes", bytes);
    } // else it is the thread's own stack
}

// "common.cuh:20, softmax.cu:12", by the debug information: where it is and what that is part of.
std::string source_line(const void* pc) {
    Dl_info info;
    if (!pc || !dladdr(pc, &info)) return "";
    char command[4096], line[1024];
    std::string lines;
    snprintf(command, sizeof command, "addr2line -s -i -e '%s' 0x%lx 2>/dev/null", info.dli_fname,
             uint64_t(pc) - uint64_t(info.dli_fbase) - 1);
    if (FILE* pipe = popen(command, "r")) {
        while (fgets(line, sizeof line, pipe)) {
            line[strcspn(line, " \n")] = 0;
            lines += (lines.empty() ? "" : ", ") + std::string(line);
        }
        pclose(pipe);
    }
    return lines.find('?') == lines.npos ? lines : "";
}

// The table of what was launched and called, into the file that SOFTWARE_CUDA_COUNTS names (`%p`: the process).
struct Table {
    ~Table() {
        const char* name = getenv("SOFTWARE_CUDA_COUNTS");
        if (!name || counts.empty()) return;
        std::string path = name;
        if (size_t at = path.find("%p"); at != path.npos) path.replace(at, 2, std::to_string(getpid()));
        FILE* file = fopen(path.c_str(), "w");
        if (!file) {
            perror(("software CUDA: " + path).c_str());
            return;
        }
        fprintf(file, "what\tcalls\tbytes read\tbytes written\n");
        Count sum;
        for (const auto& [what, count] : counts) {
            fprintf(file, "%s\t%lu\t%lu\t%lu\n", what.c_str(), count.calls, count.bytes_read, count.bytes_written);
            sum.calls += count.calls, sum.bytes_read += count.bytes_read, sum.bytes_written += count.bytes_written;
        }
        fprintf(file, "all\t%lu\t%lu\t%lu\n", sum.calls, sum.bytes_read, sum.bytes_written);
        fprintf(file, "most bytes allocated at once\t\t\t%lu\n", peak);
        fclose(file);
    }
} table;

} // namespace

Lock::Lock() { mutex.lock(); }
Lock::~Lock() { mutex.unlock(); }

bool recording() {
    static const bool on = [] {
        const char* value = getenv("SOFTWARE_CUDA_RECORD");
        return value && *value && strcmp(value, "0") != 0;
    }();
    return on;
}

void begin(const std::string& what) {
    current = what;
    counter = counting ? &counts[what] : nullptr;
    if (counter) ++counter->calls;
}
const std::string& running() { return current; }

void add(Access access, uint64_t bytes) {
    if (counter) (access == READ ? counter->bytes_read : counter->bytes_written) += bytes;
}

void count_from_here() {
    counts.clear();
    counting = true;
    counter = nullptr;
    peak = in_use;
}
void count_no_more() { counting = false; }

void fail(const void* pc, const char* format, ...) {
    char what[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(what, sizeof what, format, arguments);
    va_end(arguments);
    const std::string line = source_line(pc), at = in_kernel ? who() : "";
    fprintf(stderr, "software CUDA: %s: %s%s%s%s%s\n", current.c_str(), at.c_str(), at.empty() ? "" : " ", what,
            line.empty() ? "" : ", at ", line.c_str());
    if (in_kernel) give_up();
}

void* allocate(size_t bytes) {
    prepare();
    uint64_t at = place_from(cursor, bytes);
    if (at == SPAN) at = place_from(LEAST_GAP, bytes);
    if (at == SPAN) return nullptr;
    allocations[at] = bytes;
    cursor = at + pages(bytes) + gap_after(bytes);
    in_use += bytes;
    if (counting && in_use > peak) peak = in_use;
    if (!recording()) {
        memset(base + at, 0xff, bytes); // not a number, in every type that has such
        memset(states + at, UNWRITTEN, bytes);
    }
    return base + at;
}

bool release(void* address) {
    auto it = allocations.find(uint64_t(address) - uint64_t(base));
    if (it == allocations.end()) return false;
    const auto [at, bytes] = *it;
    allocations.erase(it);
    in_use -= bytes;
    if (!recording()) {
        madvise(base + at, pages(bytes), MADV_DONTNEED);
        madvise(states + at, pages(bytes), MADV_DONTNEED);
        madvise(cells + at / GRANULE, pages(bytes) / GRANULE * sizeof(Cell), MADV_DONTNEED);
    }
    return true;
}

size_t allocated() { return in_use; }

uint64_t end_of(uint64_t address) {
    const uint64_t offset = address - uint64_t(base);
    auto after = allocations.upper_bound(offset);
    if (after == allocations.begin()) return 0;
    auto [start, size] = *std::prev(after);
    return offset < start + size ? uint64_t(base) + start + size : 0;
}

bool check(const void* address, size_t bytes, Access access) { return check_runs(address, bytes, 1, 0, access); }

bool check_runs(const void* address, size_t bytes, size_t columns, size_t pitch, Access access) {
    if (bytes == 0 || columns == 0) return true;
    add(access, bytes * columns);
    const char* verb = access == READ ? "reads" : "writes";
    for (size_t column = 0; column < columns; ++column) {
        const uint64_t at = uint64_t(address) + column * pitch, end = end_of(at), offset = at - uint64_t(base);
        if (end == 0 || at + bytes > end) {
            fail(nullptr, "%s %zu bytes at %s, which end too soon", verb, bytes,
                 offset < SPAN ? described(offset).c_str() : "an address of the host");
            return false;
        }
        if (recording()) continue;
        uint8_t* s = states + offset;
        if (access == WRITE) {
            memset(s, WRITTEN, bytes);
        } else if (!all_written(s, bytes)) {
            size_t bad = 0;
            while (s[bad] == WRITTEN) ++bad;
            fail(nullptr, "%s %zu bytes of which some, at %s, were never written", verb, bytes,
                 described(offset + bad).c_str());
            return false;
        }
    }
    return true;
}

void touch(const void* address, size_t bytes, Access how, const void* pc) {
    if (how == READ) {
        access<READ, 0>(address, bytes, bytes, pc);
    } else {
        access<WRITE, 0>(address, bytes, bytes, pc);
    }
}

bool is_shared(const void* address) {
    const uint64_t at = uint64_t(address);
    return at - fixed.base < fixed.size || at - dynamic.base < MOST_DYNAMIC;
}

void begin_write(void* address, size_t bytes, const void* pc) {
    touch(address, bytes, WRITE, pc);
    Shared& shared = uint64_t(address) - fixed.base < fixed.size ? fixed : dynamic;
    memset(address, 0xff, bytes);
    memset(shared.states.data() + (uint64_t(address) - shared.base), UNWRITTEN, bytes);
}

void new_launch(uint64_t address, size_t bytes, size_t dynamic_bytes, bool with_races) {
    global_races = with_races;
    const auto renew = [](Shared& shared, uint64_t address, size_t bytes) {
        shared.base = address;
        shared.size = bytes;
        shared.states.assign(bytes, UNWRITTEN);
        shared.cells.assign(bytes, Cell{});
    };
    renew(fixed, address, bytes);
    renew(dynamic, uint64_t(software_dynamic_shared), dynamic_bytes);
    if (++launch == 0) {
        madvise(cells, SPAN / GRANULE * sizeof(Cell), MADV_DONTNEED);
        launch = 1;
    }
}

void new_block() {
    for (Shared* shared : {&fixed, &dynamic}) {
        if (!shared->size) continue;
        memset((void*)shared->base, 0xff, shared->size);
        memset(shared->states.data(), UNWRITTEN, shared->size);
    }
}

} // namespace software

#define ACCESS(kind, how, bytes, alignment) \
    void __tsan_##kind##bytes(void* p) { \
        software::access<software::how, bytes>(p, bytes, alignment, __builtin_return_address(0)); \
    }
#define ACCESSES(bytes) \
    ACCESS(read, READ, bytes, bytes) \
    ACCESS(write, WRITE, bytes, bytes) \
    ACCESS(unaligned_read, READ, bytes, 1) \
    ACCESS(unaligned_write, WRITE, bytes, 1)
extern "C" {
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* p, size_t bytes) {
    if (bytes) software::access<software::READ, 0>(p, bytes, 1, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) {
    if (bytes) software::access<software::WRITE, 0>(p, bytes, 1, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
