// The part of CUDA's own header that the kernels use, for the host compiler. ../scheduler.h runs the threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "launches.h"
#include "scheduler.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

// ---------------------------------------------------------------- types and indices

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3() = default;
    explicit dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Vectors are read and written whole, as on a GPU, and not member by member: the emulation counts accesses.
template <int BYTES>
inline void copy_whole(void* to, const void* from) {
    typedef unsigned Whole __attribute__((vector_size(BYTES), may_alias));
    *static_cast<Whole*>(to) = *static_cast<const Whole*>(from);
}
template <typename T>
struct alignas(8) Vector2 {
    T x, y;
    Vector2() = default;
    Vector2(T x, T y) : x(x), y(y) {}
    Vector2(const Vector2& other) { copy_whole<8>(this, &other); }
    Vector2& operator=(const Vector2& other) {
        copy_whole<8>(this, &other);
        return *this;
    }
};
template <typename T>
struct alignas(16) Vector4 {
    T x, y, z, w;
    Vector4() = default;
    Vector4(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}
    Vector4(const Vector4& other) { copy_whole<16>(this, &other); }
    Vector4& operator=(const Vector4& other) {
        copy_whole<16>(this, &other);
        return *this;
    }
};
using float2 = Vector2<float>;
using float4 = Vector4<float>;
using uint2 = Vector2<unsigned>;
using uint4 = Vector4<unsigned>;
inline float2 make_float2(float x, float y) {
    return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
    return {x, y, z, w};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return {x, y, z, w};
}

static const emulation::Index& threadIdx = emulation::thread_index;
static const emulation::Index& blockIdx = emulation::block_index;
static const emulation::Index& blockDim = emulation::block_size;
static const emulation::Index& gridDim = emulation::grid_size;

// ---------------------------------------------------------------- functions of one thread

using std::max;
using std::min;

inline float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
// A GPU's exponentials are off by at most two units in the last place, and `noise` adds such an error. It is drawn from
// the argument's bits, so that equal arguments have equal results. Division is correctly rounded.
inline float with_noise(float y, float x) {
    if (!emulation::options.noise) return y;
    const unsigned drawn = (__float_as_uint(x) * 2654435761u) >> 8;
    return static_cast<float>(y * (1.0 + (drawn / 8388608.0 - 1.0) / 4194304.0));  // [-1, 1) times 2^-22
}
inline float noisy_exp2f(float x) {
    return with_noise(std::exp2(x), x);
}
inline float noisy_expf(float x) {
    return with_noise(std::exp(x), x);
}
#define exp2f noisy_exp2f
#define expf noisy_expf
inline float __frcp_rn(float x) {
    return 1.0f / x;
}
// Keeps the compiler from fusing the product with a later addition.
inline float __fmul_rn(float x, float y) {
    float product = x * y;
    asm("" : "+x"(product));
    return product;
}
inline int __ffs(int bits) {
    return __builtin_ffs(bits);
}
template <typename T>
T __ldg(const T* pointer) {
    return *pointer;
}

// Threads give way only where they wait for one another, so no other thread runs between load and store.
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long x) {
    const unsigned long long before = *address;
    *address = before + x;
    return before;
}

// ---------------------------------------------------------------- functions of a block or a warp

inline void __syncthreads() {
    emulation::block_barrier();
}
inline void __syncwarp(unsigned lanes = emulation::kEveryLane) {
    emulation::warp_barrier(lanes);
}

template <typename T>
T __shfl_sync(unsigned lanes, T x, int from) {
    return emulation::shuffle("__shfl_sync", lanes, x, from & 31);
}
template <typename T>
T __shfl_xor_sync(unsigned lanes, T x, int mask) {
    return emulation::shuffle("__shfl_xor_sync", lanes, x, emulation::lane() ^ (mask & 31));
}
template <typename T>
T __shfl_down_sync(unsigned lanes, T x, unsigned step) {
    const int from = emulation::lane() + static_cast<int>(step);
    return emulation::shuffle("__shfl_down_sync", lanes, x, from < 32 ? from : emulation::lane());
}
template <typename T>
T __shfl_up_sync(unsigned lanes, T x, unsigned step) {
    const int from = emulation::lane() - static_cast<int>(step);
    return emulation::shuffle("__shfl_up_sync", lanes, x, from >= 0 ? from : emulation::lane());
}
inline unsigned __ballot_sync(unsigned lanes, int vote) {
    return emulation::ballot("__ballot_sync", lanes, vote != 0);
}
inline int __any_sync(unsigned lanes, int vote) {
    return emulation::ballot("__any_sync", lanes, vote != 0) != 0;
}
inline int __all_sync(unsigned lanes, int vote) {
    return emulation::ballot("__all_sync", lanes, vote != 0) == emulation::kEveryLane;
}

// ---------------------------------------------------------------- the runtime

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
};

inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) {
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    *value = 1;
    return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
    *blocks = static_cast<int>(emulation::options.resident);
    return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
    return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) {
    return "invalid argument";
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
    return emulation::allow_shared(reinterpret_cast<const void*>(kernel), bytes) ? cudaSuccess : cudaErrorInvalidValue;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    const emulation::Grid grid{config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes,
                               reinterpret_cast<const void*>(kernel)};
    if (!emulation::fits(grid.kernel, grid)) return cudaErrorInvalidValue;
    if (emulation::listing_launches) {
        emulation::launches().push_back({grid, emulation::packed(Parameters(arguments)...)});
        if (grid.blocks > 1) return cudaSuccess;
    }
    emulation::run(grid, [&] { kernel(Parameters(arguments)...); });
    return cudaSuccess;
}
