// What the checks share: numbers on the device, launches, and mistakes that must be found.
#pragma once

#include "numbers.h"

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <unistd.h>

using software::Type;

extern "C" {
int cuModuleLoadData(void**, const void*);
int cuModuleGetFunction(void**, void*, const char*);
int cuFuncSetAttribute(void*, int, int);
int cuLaunchKernel(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
int cuMemAlloc_v2(uint64_t*, size_t);
int cuMemFree_v2(uint64_t);
int cuMemcpyHtoD_v2(uint64_t, const void*, size_t);
int cuMemcpyDtoH_v2(void*, uint64_t, size_t);
}

inline int failures;
inline void wrong(const std::string& what) {
    printf("FAILED: %s\n", what.c_str());
    ++failures;
}

using Numbers = std::vector<float>;

// Memory of the device with numbers of a type.
struct Buffer {
    uint64_t address = 0;
    size_t n;
    Type type;

    Buffer(size_t n, Type type = Type::F32) : n(n), type(type) { cuMemAlloc_v2(&address, n * size_of(type)); }
    Buffer(const Numbers& values, Type type = Type::F32) : Buffer(values.size(), type) {
        std::vector<char> bytes(n * size_of(type));
        for (size_t i = 0; i < n; ++i) software::store(bytes.data(), i, type, values[i]);
        cuMemcpyHtoD_v2(address, bytes.data(), bytes.size());
    }
    Buffer(const Buffer&) = delete;
    ~Buffer() { cuMemFree_v2(address); }
    bool read(Numbers& to) const {
        std::vector<char> bytes(n * size_of(type));
        to.resize(n);
        if (cuMemcpyDtoH_v2(bytes.data(), address, bytes.size()) != 0) return false;
        for (size_t i = 0; i < n; ++i) to[i] = software::load(bytes.data(), i, type);
        return true;
    }
};

// What the device holds of `values`: rounded to bf16 where that is the type.
inline Numbers held(Numbers values, Type type) {
    for (float& v : values) {
        uint32_t place;
        software::store(&place, 0, type, v);
        v = software::load(&place, 0, type);
    }
    return values;
}

inline Numbers drawn(size_t n, unsigned seed, float scale = 1) {
    Numbers r(n);
    for (float& v : r) {
        seed = seed * 1664525 + 1013904223;
        v = scale * (float(seed >> 8) / (1 << 23) - 1);
    }
    return r;
}

template <class T> void* pointer(T& v) { return &v; }
inline void* pointer(Buffer& buffer) { return &buffer.address; }

inline unsigned dynamic_bytes; // shared memory that the next launches ask for

inline void* function_of(const std::string& module, const char* kernel) {
    void *loaded = nullptr, *function = nullptr;
    if (cuModuleLoadData(&loaded, ("// hypnos " + module + "\n").c_str()) != 0) abort();
    if (cuModuleGetFunction(&function, loaded, kernel) != 0) abort();
    return function;
}

template <class... T>
int launch(const std::string& module, const char* kernel, unsigned blocks, unsigned threads, const T&... arguments) {
    void* function = function_of(module, kernel);
    void* pointers[] = {pointer(const_cast<T&>(arguments))...};
    return cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, dynamic_bytes, nullptr, pointers, nullptr);
}

inline void ran(const std::string& what, int status) {
    if (status != 0) wrong(what + ": status " + std::to_string(status));
}

// What `call` writes to stderr.
inline std::string said(const std::function<int()>& call, int& status) {
    fflush(stderr);
    FILE* file = tmpfile();
    if (!file) {
        perror("a temporary file");
        abort();
    }
    const int before = dup(2);
    dup2(fileno(file), 2);
    status = call();
    fflush(stderr);
    dup2(before, 2);
    close(before);
    char text[4096];
    const ssize_t n = pread(fileno(file), text, sizeof text, 0);
    fclose(file);
    return std::string(text, n > 0 ? n : 0);
}

inline void found(const char* what, const char* words, const std::function<int()>& call) {
    int status;
    const std::string text = said(call, status);
    if (status == 0) return wrong(std::string(what) + " was not found");
    if (text.find(words) == text.npos) return wrong(std::string(what) + ": wanted \"" + words + "\", got " + text);
    printf("found: %s", text.c_str());
}
