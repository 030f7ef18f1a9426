// Instructions that C++ does not express: conversions of 16-bit numbers, matrix loads and products of a warp,
// asynchronous copies. The one file with PTX; tests/emulated has its twin for the CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/elements.h"

namespace interformer {
namespace cuda {

// `threadIdx.x`, read anew at every call: the compiler cannot know that it is the same each time.
__device__ inline int thread_index() {
    int index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
}

// ---------------------------------------------------------------- numbers

__device__ inline float widen(float x) {
    return x;
}
__device__ inline float widen(Tf32 x) {
    return x.value;
}
__device__ inline float widen(BFloat16 x) {
    return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ inline float widen(Float16 x) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
    return wide;
}

// The nearest number of the type, ties to even.
template <typename T>
__device__ T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) {
    return x;
}
template <>
__device__ inline Tf32 narrow<Tf32>(float x) {
    return {x};
}
template <>
__device__ inline BFloat16 narrow<BFloat16>(float x) {
    BFloat16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
template <>
__device__ inline Float16 narrow<Float16>(float x) {
    Float16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

// Two numbers narrowed into one register, `low` in its low half.
template <typename T>
__device__ uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<BFloat16>(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
template <>
__device__ inline uint32_t pack<Float16>(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// The nearest number with 10 bits of fraction, as an operand register of `mma_m16n8k8_tf32`.
__device__ inline uint32_t to_tf32(float x) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
}

// 2^x off by two units in the last place at most. Results below the smallest normal number are 0.
__device__ inline float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ---------------------------------------------------------------- shared memory

// The block's dynamic shared memory, aligned to 16 bytes.
__device__ inline char* shared_memory() {
    extern __shared__ uint4 interformer_shared[];
    return reinterpret_cast<char*>(interformer_shared);
}

__device__ inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four 8 x 8 matrices of 16-bit numbers. Lane `8 m + r` names row `r` of matrix `m` (16 bytes, aligned). In `to[m]` a
// lane gets two numbers of row `lane / 4` of matrix `m`: columns `2 (lane % 4)` and the next; `_trans` transposes
// first.
__device__ inline void ldmatrix_x4(uint32_t (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ inline void ldmatrix_x4_trans(uint32_t (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Starts a copy of BYTES (4, 8 or 16; both addresses aligned to that) from global to shared memory: the first `bytes`
// are read, the rest is zero.
template <int BYTES>
__device__ inline void cp_async(void* to, const void* from, int bytes) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     :
                     : "r"(shared_address(to)), "l"(from), "r"(bytes)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                     :
                     : "r"(shared_address(to)), "l"(from), "n"(BYTES), "r"(bytes)
                     : "memory");
}
// The same for all 16 bytes, or, unless `copied`, 16 zeros; then `from` is not read and may be any aligned address.
// A number of bytes known only at run time would take four more instructions.
__device__ inline void cp_async_or_zero(void* to, const void* from, bool copied) {
    cp_async<16>(to, from, copied ? 16 : 0);
}
// Makes a group of the copies that this thread started since the last call.
__device__ inline void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits for all groups of this thread but the last PENDING. Copies of other threads are visible after a barrier.
template <int PENDING>
__device__ inline void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ---------------------------------------------------------------- products

// acc += a b for a 16 x 16 matrix `a` and a 16 x 8 matrix `b`, in the fragment layout of `mma.m16n8k16` (acc_tile.cuh
// and tiles.cuh).
template <typename T>
__device__ void mma_m16n8k16(float (&acc)[4], const uint32_t (&a)[4], uint32_t b_low, uint32_t b_high);
template <>
__device__ inline void mma_m16n8k16<BFloat16>(float (&acc)[4], const uint32_t (&a)[4], uint32_t b_low,
                                              uint32_t b_high) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}
template <>
__device__ inline void mma_m16n8k16<Float16>(float (&acc)[4], const uint32_t (&a)[4], uint32_t b_low, uint32_t b_high) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}

// The same for a 16 x 8 matrix `a` and an 8 x 8 matrix `b` of TF32 numbers, in the layout of `mma.m16n8k8`.
__device__ inline void mma_m16n8k8_tf32(float (&acc)[4], const uint32_t (&a)[4], uint32_t b_low, uint32_t b_high) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}

}  // namespace cuda
}  // namespace interformer
