// Element types: numbers are widened to the accumulation type when read, and rounded when written.
#pragma once

#include <type_traits>

#include "common/element.h"
#include "cpu/kernels/isa.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

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

// ---------------------------------------------------------------- vectors of elements

// As many integers of type I as a vector has numbers of type float.
template <typename I>
struct WithFloats {
    typedef I type __attribute__((vector_size(kVectorBytes / sizeof(float) * sizeof(I))));
};
using Bits16 = WithFloats<uint16_t>::type;
using Bits32 = WithFloats<uint32_t>::type;

inline Vector<float> load_wide(const float* from) {
    return load_vector(from);
}
inline Vector<double> load_wide(const double* from) {
    return load_vector(from);
}
inline void store_wide(float* to, Vector<float> x) {
    store_vector(to, x);
}
inline void store_wide(double* to, Vector<double> x) {
    store_vector(to, x);
}

// GCC's own conversions of such vectors take several shuffles.
INTERFORMER_INLINE Bits32 zero_extended(Bits16 x) {
#if defined(__AVX512F__)
    return (Bits32)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)x);
#elif defined(__AVX2__) && !defined(INTERFORMER_WIDE)
    return (Bits32)_mm256_cvtepu16_epi32((__m128i)x);
#else
    return __builtin_convertvector(x, Bits32);
#endif
}
INTERFORMER_INLINE Bits16 low_halves(Bits32 x) {
#if defined(__AVX512F__)
    return (Bits16)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)x);
#else
    return __builtin_convertvector(x, Bits16);
#endif
}

// Neighbouring elements as a vector of their accumulation type.
INTERFORMER_INLINE Vector<float> load_wide(const BFloat16* from) {
    Bits16 bits;
    std::memcpy(&bits, from, sizeof bits);
    return (Vector<float>)(zero_extended(bits) << 16);
}

// The inverse, with the bits of `store`.
INTERFORMER_INLINE void store_wide(BFloat16* to, Vector<float> x) {
    const Bits32 bits = (Bits32)x;
    const Bits32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Bits16 narrowed = low_halves(x != x ? 0x7fc0u | (bits >> 16) : rounded);
    std::memcpy(to, &narrowed, sizeof narrowed);
}

// The instructions keep subnormal numbers and round to nearest, ties to even, whatever the processor's mode is.
INTERFORMER_INLINE Vector<float> load_wide(const Float16* from) {
    Vector<float> x;
#if defined(__AVX512F__)  // masks of all lanes, since the plain forms make GCC warn
    x = _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
    for (int part = 0; part < kLanes<float>; part += 8) {
        const __m256 eight = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + part)));
        std::memcpy(reinterpret_cast<char*>(&x) + 4 * part, &eight, sizeof eight);
    }
#else
    for (int lane = 0; lane < kLanes<float>; ++lane) x[lane] = load(from[lane]);
#endif
    return x;
}

INTERFORMER_INLINE void store_wide(Float16* to, Vector<float> x) {
#if defined(__AVX512F__)
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtps_ph(0xffff, x, kNearest));
#elif defined(__F16C__)
    for (int part = 0; part < kLanes<float>; part += 8) {
        __m256 eight;
        std::memcpy(&eight, reinterpret_cast<const char*>(&x) + 4 * part, sizeof eight);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + part), _mm256_cvtps_ph(eight, _MM_FROUND_TO_NEAREST_INT));
    }
#else
    for (int lane = 0; lane < kLanes<float>; ++lane) store(to[lane], x[lane]);
#endif
}

// The first `count` of a vector's elements, fewer than all; the other lanes are 0, and the other elements untouched.
template <typename T>
INTERFORMER_INLINE Vector<Acc<T>> load_first(const T* from, int64_t count) {
#ifdef __AVX512BW__
    const uint32_t mask = (1u << count) - 1;
    if constexpr (std::is_same_v<T, double>)
        return _mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), from);
    else if constexpr (std::is_same_v<T, float>)
        return _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from);
    else if constexpr (std::is_same_v<T, BFloat16>)
        return (Vector<float>)(zero_extended((Bits16)_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), from))
                               << 16);
    else
        return _mm512_maskz_cvtph_ps(0xffff, _mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), from));
#else
    T elements[kLanes<Acc<T>>] = {};
    for (int64_t i = 0; i < count; ++i) elements[i] = from[i];
    return load_wide(elements);
#endif
}
template <typename T>
INTERFORMER_INLINE void store_first(T* to, int64_t count, Vector<Acc<T>> x) {
    T elements[kLanes<Acc<T>>];
    store_wide(elements, x);
    for (int64_t i = 0; i < count; ++i) to[i] = elements[i];
}

// `store_wide` past the caches, to an address that is a multiple of the elements' bytes; `finish_streams` orders these
// stores before all later ones.
template <typename T>
INTERFORMER_INLINE void stream_wide(T* to, Vector<Acc<T>> x) {
#if defined(__AVX2__) && !defined(INTERFORMER_WIDE)
    alignas(64) T elements[kLanes<Acc<T>>];
    store_wide(elements, x);
    if constexpr (sizeof elements == 64)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to), *reinterpret_cast<const __m512i*>(elements));
    else if constexpr (sizeof elements == 32)
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to), *reinterpret_cast<const __m256i*>(elements));
    else
        _mm_stream_si128(reinterpret_cast<__m128i*>(to), *reinterpret_cast<const __m128i*>(elements));
#else
    store_wide(to, x);
#endif
}
inline void finish_streams() {
#ifdef __AVX2__
    _mm_sfence();
#endif
}

// ---------------------------------------------------------------- runs of elements

// Reads `count` elements, `stride` apart, in the accumulation type.
template <typename T>
inline void widen(const T* from, int64_t stride, int64_t count, Acc<T>* to) {
    constexpr int64_t W = kLanes<Acc<T>>;
    int64_t i = 0;
    if (stride == 1)
        for (; i + W <= count; i += W) store_vector(to + i, load_wide(from + i));
    for (; i < count; ++i) to[i] = load(from[i * stride]);
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
    constexpr int64_t W = kLanes<Acc<T>>;
    int64_t i = 0;
    for (; i + W <= count; i += W) store_wide(to + i, load_vector(from + i));
    for (; i < count; ++i) store(to[i], from[i]);
}

INTERFORMER_ISA_END
