// The twin of csrc/cuda/instructions.cuh in C++: the same functions, with the fragment layouts that the PTX manual
// gives.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "cuda/elements.h"

namespace interformer {
namespace cuda {

inline int thread_index() {
    return static_cast<int>(threadIdx.x);
}

// ---------------------------------------------------------------- numbers

inline float widen(float x) {
    return x;
}
inline float widen(Tf32 x) {
    return x.value;
}
inline float widen(BFloat16 x) {
    return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
inline float widen(Float16 x) {
    _Float16 half;
    std::memcpy(&half, &x.bits, sizeof half);
    return half;
}

template <typename T>
T narrow(float x);
template <>
inline float narrow<float>(float x) {
    return x;
}
template <>
inline Tf32 narrow<Tf32>(float x) {
    return {x};
}
template <>
inline BFloat16 narrow<BFloat16>(float x) {
    const uint32_t bits = __float_as_uint(x);
    if (x != x) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline Float16 narrow<Float16>(float x) {
    const _Float16 half = static_cast<_Float16>(x);
    Float16 y;
    std::memcpy(&y.bits, &half, sizeof half);
    return y;
}

template <typename T>
uint32_t pack(float low, float high) {
    return narrow<T>(low).bits | static_cast<uint32_t>(narrow<T>(high).bits) << 16;
}

inline uint32_t to_tf32(float x) {
    return (__float_as_uint(x) + 0x1000) & ~0x1fffu;
}

inline float exp2_approx(float x) {
    const float y = exp2f(x);
    return y < 1.1754944e-38f ? 0.0f : y;
}

// ---------------------------------------------------------------- shared memory

inline char* shared_memory() {
    return emulation::shared_memory();
}

struct EmulatedRegisters {
    uint32_t of[4];
};

// `ldmatrix.x4`: lane `8 m + r` sends the address of row `r` of matrix `m`.
inline void ldmatrix_x4(uint32_t (&to)[4], const void* row) {
    emulation::matrix_load(row);
    const EmulatedRegisters result = emulation::together<const void*, EmulatedRegisters>(
        "ldmatrix", emulation::kEveryLane, row, [](const void* const* const* rows, EmulatedRegisters* const* received) {
            for (int lane = 0; lane < 32; ++lane)
                for (int m = 0; m < 4; ++m)
                    std::memcpy(&received[lane]->of[m],
                                static_cast<const char*>(*rows[8 * m + lane / 4]) + lane % 4 * 4, 4);
        });
    std::memcpy(to, result.of, sizeof to);
}

inline void ldmatrix_x4_trans(uint32_t (&to)[4], const void* row) {
    emulation::matrix_load(row);
    const EmulatedRegisters result = emulation::together<const void*, EmulatedRegisters>(
        "ldmatrix.trans", emulation::kEveryLane, row,
        [](const void* const* const* rows, EmulatedRegisters* const* received) {
            for (int lane = 0; lane < 32; ++lane)
                for (int m = 0; m < 4; ++m) {
                    uint16_t pair[2];
                    for (int i = 0; i < 2; ++i)
                        std::memcpy(&pair[i], static_cast<const char*>(*rows[8 * m + lane % 4 * 2 + i]) + lane / 4 * 2,
                                    2);
                    received[lane]->of[m] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
                }
        });
    std::memcpy(to, result.of, sizeof to);
}

template <int BYTES>
void cp_async(void* to, const void* from, int bytes) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
    emulation::cp_async(to, from, BYTES, bytes);
}
inline void cp_async_or_zero(void* to, const void* from, bool copied) {
    cp_async<16>(to, from, copied ? 16 : 0);
}
inline void cp_async_commit() {
    emulation::cp_async_commit();
}
template <int PENDING>
void cp_async_wait() {
    emulation::cp_async_wait(PENDING);
}

// ---------------------------------------------------------------- products

struct EmulatedFragments {
    float a[8], b[4], acc[4];  // in the order of the registers, low half first
};

// `mma.m16n8k16`. With `g = lane / 4` and `t = 2 (lane % 4)`, a lane has of `a` the rows g and g + 8 (numbers 0, 1, 4,
// 5 and 2, 3, 6, 7) in the columns t, t + 1, t + 8, t + 9; of `b` the rows t, t + 1, t + 8, t + 9 in the column g; of
// the accumulator the rows g (0, 1) and g + 8 (2, 3) in the columns t, t + 1.
inline void multiply_fragments(const EmulatedFragments* const* sent, EmulatedRegisters* const* received) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4 * 2;
        for (int i = 0; i < 8; ++i) a[g + i / 2 % 2 * 8][t + i / 4 * 8 + i % 2] = sent[lane]->a[i];
        for (int i = 0; i < 4; ++i) b[t + i / 2 * 8 + i % 2][g] = sent[lane]->b[i];
    }
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            float sum = sent[lane]->acc[i];
            for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
            received[lane]->of[i] = __float_as_uint(sum);
        }
}

template <typename T>
void mma_m16n8k16(float (&acc)[4], const uint32_t (&a)[4], uint32_t b_low, uint32_t b_high) {
    EmulatedFragments mine;
    const auto put = [](float* to, uint32_t pair) {
        to[0] = widen(T{static_cast<uint16_t>(pair)});
        to[1] = widen(T{static_cast<uint16_t>(pair >> 16)});
    };
    for (int i = 0; i < 4; ++i) put(mine.a + 2 * i, a[i]);
    put(mine.b, b_low);
    put(mine.b + 2, b_high);
    std::memcpy(mine.acc, acc, sizeof acc);
    const EmulatedRegisters result = emulation::together<EmulatedFragments, EmulatedRegisters>(
        "mma", emulation::kEveryLane, mine, multiply_fragments);
    std::memcpy(acc, result.of, sizeof acc);
}

// `mma.m16n8k8`. With `g = lane / 4` and `t = lane % 4`, a lane has of `a` the rows g and g + 8 (numbers 0, 2 and 1, 3)
// in the columns t (0, 1) and t + 4 (2, 3); of `b` the rows t and t + 4 in the column g; the accumulator as above.
inline void multiply_tf32_fragments(const EmulatedFragments* const* sent, EmulatedRegisters* const* received) {
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4, column = lane % 4 * 2 + i % 2;
            float sum = sent[lane]->acc[i];
            for (int k = 0; k < 8; ++k) {
                const EmulatedFragments& left = *sent[row * 4 + k % 4];
                const EmulatedFragments& right = *sent[column * 4 + k % 4];
                sum += left.a[i / 2 + k / 4 * 2] * right.b[k / 4];
            }
            received[lane]->of[i] = __float_as_uint(sum);
        }
}

inline void mma_m16n8k8_tf32(float (&acc)[4], const uint32_t (&a)[4], uint32_t b_low, uint32_t b_high) {
    EmulatedFragments mine;
    for (int i = 0; i < 4; ++i) mine.a[i] = __uint_as_float(a[i]);
    mine.b[0] = __uint_as_float(b_low);
    mine.b[1] = __uint_as_float(b_high);
    std::memcpy(mine.acc, acc, sizeof acc);
    const EmulatedRegisters result = emulation::together<EmulatedFragments, EmulatedRegisters>(
        "mma.tf32", emulation::kEveryLane, mine, multiply_tf32_fragments);
    std::memcpy(acc, result.of, sizeof acc);
}

}  // namespace cuda
}  // namespace interformer
