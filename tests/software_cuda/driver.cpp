// The driver: libcuda.so.1 with one GPU of compute capability 8.0. All is done at once, in the order of the calls, so
// streams and events are but handles. A function that is missing here answers CUDA_ERROR_NOT_SUPPORTED and says so: the
// build adds those, from the names that cudarc binds.
//
// The text of a module (PTX) is not run, only its first line is read: our build script writes the module's name there.
// kernels_NAME.so beside this library has the same kernels, compiled for the CPU. A text without a name is candle's:
// for all of those there is one kernels_candle.so, with kernels of our own under the names of candle's (candle.cu).
#include "device.h"
#include "runtime.h"

#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <map>
#include <vector>

using namespace software;

namespace {

enum Status {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    NOT_FOUND = 500,
    LAUNCH_FAILED = 719,
    NOT_SUPPORTED = 801,
};

// A library of kernels and its static memory, which is what blocks share.
struct Module {
    std::string name;
    const SoftwareKernel* kernels;
    uint64_t shared;
    size_t shared_bytes;
};
struct Function {
    const Module* module;
    const SoftwareKernel* kernel;
    std::string name;
    int most_dynamic; // bytes of shared memory that a launch may ask for
};

constexpr unsigned MOST_SHARED = 163 << 10; // per block
constexpr int LAUNCHES_LOOKED_AT = 3;
int context_value;
thread_local void* current_context;
std::map<std::string, Module> modules;
std::map<std::pair<const Module*, std::string>, Function> functions;
uint64_t next_handle = 0x1000;

uint64_t device_bytes() {
    static const uint64_t bytes = [] {
        const char* value = getenv("SOFTWARE_CUDA_MEMORY");
        return value ? strtoull(value, nullptr, 10) : 80ull << 30;
    }();
    return bytes;
}

// The part of a library that is not in its file, which holds its static variables without a value.
int find_shared(dl_phdr_info* info, size_t, void* into) {
    Module& module = *(Module*)into;
    const auto first = (uint64_t)module.kernels;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const ElfW(Phdr) & part = info->dlpi_phdr[i];
        const uint64_t start = info->dlpi_addr + part.p_vaddr;
        if (part.p_type != PT_LOAD || first < start || first >= start + part.p_memsz) continue;
        module.shared = start + part.p_filesz;
        module.shared_bytes = part.p_memsz - part.p_filesz;
        return 1;
    }
    return 0;
}

std::string folder() {
    Dl_info info;
    dladdr((void*)&folder, &info);
    std::string path = info.dli_fname;
    return path.substr(0, path.rfind('/') + 1);
}

// The library of that name, null if there is none.
Module* load(const std::string& name) {
    if (auto known = modules.find(name); known != modules.end()) return &known->second;
    void* library = dlopen((folder() + "kernels_" + name + ".so").c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        fprintf(stderr, "software CUDA: %s\n", dlerror());
        return nullptr;
    }
    Module& module = modules[name];
    module.name = name;
    module.kernels = (const SoftwareKernel*)dlsym(library, "software_cuda_kernels");
    if (!module.kernels) abort();
    module.shared = 0;
    module.shared_bytes = 0;
    dl_iterate_phdr(find_shared, &module);
    return &module;
}

// Whether races in global memory are looked for: in the first launches of a kernel with the same sizes. Those that
// follow touch the same places in the same order, but for numbers read from memory.
bool first_of_its_kind(const Function& function, const std::vector<unsigned>& grid, void** arguments) {
    static std::map<std::string, int> seen;
    std::string kind = function.name;
    kind.append((const char*)grid.data(), grid.size() * sizeof(unsigned));
    for (unsigned i = 0; i < function.kernel->count; ++i) {
        const SoftwareParameter& parameter = function.kernel->parameters[i];
        if (!parameter.is_pointer) kind.append((const char*)arguments[i], parameter.bytes);
    }
    return ++seen[kind] <= LAUNCHES_LOOKED_AT;
}

// Counts a launch that is not run: what its pointers point to, up to the end of their allocations, once.
void count_operands(const SoftwareKernel& kernel, void** arguments) {
    for (unsigned i = 0; i < kernel.count; ++i) {
        if (!kernel.parameters[i].is_pointer) continue;
        const uint64_t at = *(uint64_t*)arguments[i], end = end_of(at);
        add(kernel.parameters[i].is_const ? READ : WRITE, end ? end - at : 0);
    }
}

} // namespace

extern "C" {
typedef int CUdevice;
typedef uint64_t CUdeviceptr;

int cuInit(unsigned) {
    const char* shown = getenv("CUDA_VISIBLE_DEVICES");
    return shown && (!*shown || *shown == '-') ? NO_DEVICE : SUCCESS;
}
int cuDriverGetVersion(int* version) {
    const char* value = getenv("SOFTWARE_CUDA_DRIVER");
    return *version = value ? atoi(value) : 13000, SUCCESS;
}
int cuDeviceGetCount(int* count) { return *count = 1, SUCCESS; }
int cuDeviceGet(CUdevice* device, int ordinal) {
    *device = 0;
    return ordinal == 0 ? SUCCESS : INVALID_DEVICE;
}
int cuDeviceGetName(char* name, int length, CUdevice) {
    snprintf(name, length, "software device");
    return SUCCESS;
}
int cuDeviceTotalMem_v2(size_t* bytes, CUdevice) { return *bytes = device_bytes(), SUCCESS; }
int cuDeviceGetAttribute(int* value, int attribute, CUdevice) {
    switch (attribute) {
    case 1: *value = 1024; break; // threads per block
    case 2:
    case 3: *value = 1024; break;       // a block's x, y
    case 4: *value = 64; break;         // its z
    case 5: *value = 0x7fffffff; break; // the grid's x
    case 6:
    case 7: *value = 65535; break;    // its y, z
    case 8: *value = 48 << 10; break; // shared memory per block
    case 10: *value = 32; break;      // lanes of a warp
    case 12:
    case 82: *value = 65536; break; // registers per block, per multiprocessor
    case 16: *value = 108; break;   // multiprocessors
    case 39: *value = 2048; break;  // threads per multiprocessor
    case 75: *value = 8; break;     // compute capability
    case 76: *value = 0; break;
    case 81: *value = 164 << 10; break;   // shared memory per multiprocessor
    case 97: *value = MOST_SHARED; break; // shared memory per block, on demand
    case 115: *value = 1; break;          // memory pools
    default:
        fprintf(stderr, "software CUDA: cuDeviceGetAttribute: attribute %d; wanted is one that driver.cpp has\n",
                attribute);
        return NOT_SUPPORTED;
    }
    return SUCCESS;
}
int cuDevicePrimaryCtxRetain(void** context, CUdevice) { return *context = &context_value, SUCCESS; }
int cuDevicePrimaryCtxRelease_v2(CUdevice) { return SUCCESS; }
int cuCtxGetCurrent(void** context) { return *context = current_context, SUCCESS; }
int cuCtxSetCurrent(void* context) { return current_context = context, SUCCESS; }
int cuCtxSynchronize() { return SUCCESS; }

int cuProfilerStart() {
    Lock lock;
    count_from_here();
    return SUCCESS;
}
int cuProfilerStop() {
    Lock lock;
    count_no_more();
    return SUCCESS;
}

int cuStreamCreate(void** stream, unsigned) { return *stream = (void*)(next_handle += 16), SUCCESS; }
int cuStreamDestroy_v2(void*) { return SUCCESS; }
int cuStreamSynchronize(void*) { return SUCCESS; }
int cuStreamWaitEvent(void*, void*, unsigned) { return SUCCESS; }
int cuStreamIsCapturing(void*, int* status) { return *status = 0, SUCCESS; }
int cuEventCreate(void** event, unsigned) { return *event = (void*)(next_handle += 16), SUCCESS; }
int cuEventDestroy_v2(void*) { return SUCCESS; }
int cuEventRecord(void*, void*) { return SUCCESS; }
int cuEventSynchronize(void*) { return SUCCESS; }
int cuEventQuery(void*) { return SUCCESS; }

int cuDeviceGetDefaultMemPool(void** pool, CUdevice) { return *pool = &context_value, SUCCESS; }
int cuDeviceGetMemPool(void** pool, CUdevice) { return *pool = &context_value, SUCCESS; }
int cuMemPoolSetAttribute(void*, int, void*) { return SUCCESS; }
int cuMemPoolTrimTo(void*, size_t) { return SUCCESS; }
int cuMemGetInfo_v2(size_t* free, size_t* total) {
    Lock lock;
    *total = device_bytes();
    *free = *total - allocated();
    return SUCCESS;
}

int cuMemAlloc_v2(CUdeviceptr* address, size_t bytes) {
    Lock lock;
    if (bytes == 0) return INVALID_VALUE;
    if (allocated() + bytes > device_bytes()) return OUT_OF_MEMORY;
    *address = (CUdeviceptr)allocate(bytes);
    return *address ? SUCCESS : OUT_OF_MEMORY;
}
int cuMemAllocAsync(CUdeviceptr* address, size_t bytes, void*) { return cuMemAlloc_v2(address, bytes); }
int cuMemFree_v2(CUdeviceptr address) {
    Lock lock;
    if (release((void*)address)) return SUCCESS;
    fprintf(stderr, "software CUDA: cuMemFree: %#lx; wanted is the start of an allocation\n", address);
    return INVALID_VALUE;
}
int cuMemFreeAsync(CUdeviceptr address, void*) { return cuMemFree_v2(address); }

int cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) {
    Lock lock;
    begin("copy to the device");
    if (!check((void*)to, bytes, WRITE)) return INVALID_VALUE;
    if (!recording()) memcpy((void*)to, from, bytes);
    return SUCCESS;
}
int cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) {
    Lock lock;
    begin("copy to the host");
    if (!check((void*)from, bytes, READ)) return INVALID_VALUE;
    if (recording()) {
        memset(to, 0, bytes);
    } else {
        memcpy(to, (void*)from, bytes);
    }
    return SUCCESS;
}
int cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    Lock lock;
    begin("copy on the device");
    if (!check((void*)from, bytes, READ) || !check((void*)to, bytes, WRITE)) return INVALID_VALUE;
    if (!recording()) memmove((void*)to, (void*)from, bytes);
    return SUCCESS;
}
int cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t bytes) {
    Lock lock;
    begin("memset");
    if (!check((void*)to, bytes, WRITE)) return INVALID_VALUE;
    if (!recording()) memset((void*)to, value, bytes);
    return SUCCESS;
}
int cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, void*) {
    return cuMemcpyHtoD_v2(to, from, bytes);
}
int cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, void*) { return cuMemcpyDtoH_v2(to, from, bytes); }
int cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, void*) {
    return cuMemcpyDtoD_v2(to, from, bytes);
}
int cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, void*) {
    return cuMemsetD8_v2(to, value, bytes);
}

int cuModuleLoadData(void** module, const void* image) {
    Lock lock;
    // Ours begin with "// hypnos NAME"; all others are candle's, and their kernels' names are all different.
    char name[64] = "candle";
    sscanf((const char*)image, "// hypnos %63s", name);
    *module = load(name);
    return *module ? SUCCESS : INVALID_IMAGE;
}
int cuModuleUnload(void*) { return SUCCESS; }
int cuModuleGetFunction(void** function, void* handle, const char* name) {
    Lock lock;
    const Module* module = (const Module*)handle;
    if (auto known = functions.find({module, name}); known != functions.end()) {
        *function = &known->second;
        return SUCCESS;
    }
    for (const SoftwareKernel* kernel = module->kernels; kernel->name; ++kernel) {
        if (strcmp(kernel->name, name) != 0) continue;
        const std::string title = module->name + "." + name;
        *function = &(functions[{module, name}] = {module, kernel, title, 48 << 10});
        return SUCCESS;
    }
    fprintf(stderr, "software CUDA: module %s has no kernel %s; if it is candle's, candle.cu should have it\n",
            module->name.c_str(), name);
    return NOT_FOUND;
}

int cuFuncSetAttribute(void* handle, int attribute, int value) {
    Function& function = *(Function*)handle;
    if (attribute == 9) return SUCCESS; // the preferred carveout
    if (attribute != 8 || value < 0 || value > (int)MOST_SHARED) {
        fprintf(stderr,
                "software CUDA: cuFuncSetAttribute: %s: attribute %d of value %d; wanted is 8, bytes of shared memory "
                "that a launch may ask for, of at most %u\n",
                function.name.c_str(), attribute, value, MOST_SHARED);
        return INVALID_VALUE;
    }
    function.most_dynamic = value;
    return SUCCESS;
}

int cuLaunchKernel(void* handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                   unsigned block_z, unsigned shared_bytes, void*, void** arguments, void**) {
    Lock lock;
    const Function& function = *(const Function*)handle;
    begin(function.name);
    const uint64_t threads = (uint64_t)block_x * block_y * block_z;
    if (threads == 0 || threads > 1024 || !grid_x || !grid_y || !grid_z || grid_y > 65535 || grid_z > 65535) {
        fprintf(stderr,
                "software CUDA: %s: a grid of %u x %u x %u blocks of %u x %u x %u threads; wanted are 1 to 1024 "
                "threads, and 1 block or more each way, in y and z up to 65535\n",
                function.name.c_str(), grid_x, grid_y, grid_z, block_x, block_y, block_z);
        return INVALID_VALUE;
    }
    if (shared_bytes > (unsigned)function.most_dynamic || function.module->shared_bytes + shared_bytes > MOST_SHARED) {
        fprintf(stderr,
                "software CUDA: %s: %u bytes of shared memory are too many: it may ask for %d, and with the %zu of its "
                "own file there may be %u\n",
                function.name.c_str(), shared_bytes, function.most_dynamic, function.module->shared_bytes,
                MOST_SHARED);
        return INVALID_VALUE;
    }
    if (recording()) {
        count_operands(*function.kernel, arguments);
        return SUCCESS;
    }
    new_launch(function.module->shared, function.module->shared_bytes, shared_bytes,
               first_of_its_kind(function, {grid_x, grid_y, grid_z, block_x, block_y, block_z}, arguments));
    const Launch launch = {function.kernel->call, arguments, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}};
    return run(launch) ? SUCCESS : LAUNCH_FAILED;
}

int cuGetErrorName(int error, const char** name) {
    switch (error) {
    case SUCCESS: *name = "CUDA_SUCCESS"; break;
    case INVALID_VALUE: *name = "CUDA_ERROR_INVALID_VALUE"; break;
    case OUT_OF_MEMORY: *name = "CUDA_ERROR_OUT_OF_MEMORY"; break;
    case NO_DEVICE: *name = "CUDA_ERROR_NO_DEVICE"; break;
    case INVALID_DEVICE: *name = "CUDA_ERROR_INVALID_DEVICE"; break;
    case INVALID_IMAGE: *name = "CUDA_ERROR_INVALID_IMAGE"; break;
    case NOT_FOUND: *name = "CUDA_ERROR_NOT_FOUND"; break;
    case LAUNCH_FAILED: *name = "CUDA_ERROR_LAUNCH_FAILED"; break;
    case NOT_SUPPORTED: *name = "CUDA_ERROR_NOT_SUPPORTED"; break;
    default: *name = "CUDA_ERROR_UNKNOWN";
    }
    return SUCCESS;
}
int cuGetErrorString(int error, const char** text) {
    cuGetErrorName(error, text);
    if (error == LAUNCH_FAILED) *text = "the software device found a fault in the kernel; stderr says which";
    return SUCCESS;
}
}
