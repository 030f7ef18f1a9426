// Element types, the type each is computed in, and the way between them.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/tensor_view.h"

namespace interformer {

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

// The type of accumulation: float, and double for double.
template <typename T>
struct Accumulator {
    using type = float;
};
template <>
struct Accumulator<double> {
    using type = double;
};
template <typename T>
using Acc = typename Accumulator<T>::type;

template <typename T>
constexpr DType dtype_for = DType::other;
template <>
constexpr DType dtype_for<float> = DType::float32;
template <>
constexpr DType dtype_for<double> = DType::float64;
template <>
constexpr DType dtype_for<BFloat16> = DType::bfloat16;
template <>
constexpr DType dtype_for<Float16> = DType::float16;

// Calls `function` with a value of the element type of this dtype, for the sake of its type.
template <typename Function>
void with_element_type(DType dtype, Function&& function) {
    switch (dtype) {
        case DType::float32:
            return function(float{});
        case DType::float64:
            return function(double{});
        case DType::bfloat16:
            return function(BFloat16{});
        case DType::float16:
            return function(Float16{});
        default:
            return;  // the callers check the dtype first, with the argument's name
    }
}

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
    if (magnitude < 0x0400u) return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-24f));  // subnormal
    const uint32_t widened = magnitude << 13;                                 // in float's field widths
    if (magnitude >= 0x7c00u) return float_of(sign | widened | 0x7f800000u);  // infinity and NaN
    return float_of(sign | (widened + (112u << 23)));                         // exponent bias 15 becomes 127
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
    uint32_t half;
    if (magnitude > 0x7f800000u) {
        half = 0x7e00u;
    } else if (magnitude >= 0x477ff000u) {  // from 65520, half way past the largest number
        half = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 1/2 leaves the subnormal's bits, rounded, at the end
        half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    } else {
        half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    }
    to.bits = static_cast<uint16_t>(sign | half);
}

// `count` elements from `from` on, `stride` apart, in the type of accumulation.
template <typename T>
void widen(const T* from, int64_t stride, int64_t count, Acc<T>* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = load(from[i * stride]);
}

template <typename T>
void narrow(const Acc<T>* from, int64_t count, T* to) {
    for (int64_t i = 0; i < count; ++i) store(to[i], from[i]);
}

}  // namespace interformer
