// Element types: numbers are widened to the accumulation type when read, and rounded when written.
#pragma once

#include "common/element.h"
#include "cpu/kernels/isa.h"

INTERFORMER_ISA_BEGIN

template <typename T>
constexpr Acc<T> largest_number = __FLT_MAX__;
template <>
constexpr double largest_number<double> = __DBL_MAX__;
template <>
constexpr float largest_number<BFloat16> = 0x1.fep127f;
template <>
constexpr float largest_number<Float16> = 65504.0f;

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline float load(float x) {
    return x;
}
inline double load(double x) {
    return x;
}
inline float load(BFloat16 x) {
    return float_of(static_cast<uint32_t>(x.bits) << 16);
}

inline float load(Float16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
    const uint32_t magnitude = x.bits & 0x7fffu;
    const uint32_t widened = magnitude << 13;  // in float's field widths
    const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
    const uint32_t normal = widened + (112u << 23);  // exponent bias 15 becomes 127
    const uint32_t special = widened | 0x7f800000u;  // infinity and NaN
    const uint32_t unsigned_bits = magnitude < 0x0400u ? bits_of(subnormal) : magnitude >= 0x7c00u ? special : normal;
    return float_of(sign | unsigned_bits);
}

inline void store(float& to, float x) {
    to = x;
}
inline void store(double& to, double x) {
    to = x;
}

// Both round to nearest, ties to even, and keep NaNs quiet.
inline void store(BFloat16& to, float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    to.bits = static_cast<uint16_t>(x != x ? 0x7fc0u | (bits >> 16) : rounded >> 16);
}

inline void store(Float16& to, float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Below 2^-14, adding 1/2 leaves the rounded bits of the subnormal number in the low bits.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // from 65520 on, halfway past the largest number
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    to.bits = static_cast<uint16_t>(sign | half);
}

// Reads `count` elements, `stride` apart, in the accumulation type.
template <typename T>
inline void widen(const T* from, int64_t stride, int64_t count, Acc<T>* to) {
    if (stride == 1)
        for (int64_t i = 0; i < count; ++i) to[i] = load(from[i]);
    else
        for (int64_t i = 0; i < count; ++i) to[i] = load(from[i * stride]);
}

// The same in the type in which numbers are stored for products (`Stored`).
template <typename T>
inline void copy_stored(const T* from, int64_t stride, int64_t count, Acc<T>* to) {
    widen(from, stride, count, to);
}
inline void copy_stored(const BFloat16* from, int64_t stride, int64_t count, BFloat16* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i * stride];
}

template <typename T>
inline void narrow(const Acc<T>* from, int64_t count, T* to) {
    for (int64_t i = 0; i < count; ++i) store(to[i], from[i]);
}

INTERFORMER_ISA_END
