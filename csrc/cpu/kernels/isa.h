// The files in this folder are compiled once for each instruction set, with INTERFORMER_ISA as its name. All their
// definitions lie in an unnamed namespace inside a namespace of that name: the linker must never keep a function that
// was compiled for a newer processor as the one copy for all. For the same reason the C++ library is not used here.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#ifndef INTERFORMER_ISA
#error "compile this file with INTERFORMER_ISA set to the name of an instruction set"
#endif

#define INTERFORMER_ISA_BEGIN   \
    namespace interformer {     \
    namespace INTERFORMER_ISA { \
    namespace {
#define INTERFORMER_ISA_END \
    }                       \
    }                       \
    }

// Products of pairs of bfloat16 numbers: where the processor has them, and in `wide`, which stands in for it in tests.
#if defined(__AVX512BF16__) || defined(INTERFORMER_WIDE)
#define INTERFORMER_PAIRS
#endif

// For functions called from many inner loops, which the compiler would otherwise not inline.
#define INTERFORMER_INLINE inline __attribute__((always_inline))
#define INTERFORMER_LAMBDA __attribute__((always_inline))  // behind the parameters of a lambda

INTERFORMER_ISA_BEGIN

#if defined(__AVX512F__) || defined(INTERFORMER_WIDE)
constexpr int kVectorBytes = 64;
constexpr int kTileRows = 12;  // with two vectors each, 24 of 32 registers hold sums
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kTileRows = 6;  // 12 of 16 registers
#else
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 6;
#endif

template <typename A>
struct VectorOf {
    typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <typename A>
using Vector = typename VectorOf<A>::type;

// Numbers of type A in a vector, and in a panel, which is two vectors wide.
template <typename A>
constexpr int64_t kLanes = kVectorBytes / sizeof(A);
template <typename A>
constexpr int64_t kPanel = 2 * kLanes<A>;

template <typename A>
inline Vector<A> load_vector(const A* from) {
    Vector<A> x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

template <typename A>
inline void store_vector(A* to, Vector<A> x) {
    std::memcpy(to, &x, sizeof x);
}

// The type of lane indices for a vector of A.
template <typename A>
struct IndexOf {
    using type = int32_t;
};
template <>
struct IndexOf<double> {
    using type = int64_t;
};
template <>
struct IndexOf<int64_t> {
    using type = int64_t;
};

// Reduces all lanes with `op`, by halves: few roundings, always in the same order.
template <typename A, int64_t Half = kLanes<A> / 2, typename Op>
INTERFORMER_INLINE A reduce_lanes(Vector<A> x, Op&& op) {
    if constexpr (Half == 0) {
        return x[0];
    } else {
        Vector<typename IndexOf<A>::type> other;
#pragma GCC unroll 16
        for (int lane = 0; lane < kLanes<A>; ++lane) other[lane] = lane ^ Half;
        return reduce_lanes<A, Half / 2>(op(x, __builtin_shuffle(x, other)), op);
    }
}
// Operations of reductions. Max skips a NaN in its first operand.
struct Plus {
    template <typename V>
    INTERFORMER_INLINE V operator()(V a, V b) const {
        return a + b;
    }
};
struct Max {
    template <typename V>
    INTERFORMER_INLINE V operator()(V a, V b) const {
        return a > b ? a : b;
    }
};
template <typename A>
INTERFORMER_INLINE A max_of_lanes(Vector<A> x) {
    return reduce_lanes<A>(x, Max{});
}

// Whether a comparison of vectors of A holds in any lane.
template <typename A>
INTERFORMER_INLINE bool any(Vector<typename IndexOf<A>::type> lanes) {
#ifdef __AVX512F__
    return _mm512_test_epi32_mask((__m512i)lanes, (__m512i)lanes) != 0;
#else
    return reduce_lanes<typename IndexOf<A>::type>(lanes, [](auto a, auto b) { return a | b; }) != 0;
#endif
}

inline int64_t min(int64_t a, int64_t b) {
    return a < b ? a : b;
}
inline int64_t max(int64_t a, int64_t b) {
    return a > b ? a : b;
}
inline int64_t round_up(int64_t x, int64_t multiple) {
    return (x + multiple - 1) / multiple * multiple;
}

template <typename A>
inline void fill(A* to, int64_t count, A value) {
    for (int64_t i = 0; i < count; ++i) to[i] = value;
}

INTERFORMER_ISA_END
