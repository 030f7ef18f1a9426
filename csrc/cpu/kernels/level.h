// Files in this folder are compiled once for each instruction set, with INTERFORMER_LEVEL as the set's name. All they
// define lies in a namespace of that name, unnamed inside: a function compiled for a newer processor must never be the
// copy that the linker keeps for an older one. For the same reason nothing of the C++ library is used here.
#pragma once

#include <cstdint>
#include <cstring>

#ifndef INTERFORMER_LEVEL
#error "compile this file with INTERFORMER_LEVEL set to the name of an instruction set"
#endif

#define INTERFORMER_LEVEL_BEGIN   \
    namespace interformer {       \
    namespace INTERFORMER_LEVEL { \
    namespace {
#define INTERFORMER_LEVEL_END \
    }                         \
    }                         \
    }

// Products of pairs of bfloat16 numbers: where the processor has them, and in the level that stands for it in tests.
#if defined(__AVX512BF16__) || defined(INTERFORMER_WIDE)
#define INTERFORMER_PAIRS
#endif

// For what is called from one inner loop after another: left to itself the compiler makes a function of it.
#define INTERFORMER_INLINE inline __attribute__((always_inline))

INTERFORMER_LEVEL_BEGIN

#if defined(__AVX512F__) || defined(INTERFORMER_WIDE)
constexpr int kVectorBytes = 64;
constexpr int kTileRows = 12;  // with two vectors each: 24 of 32 registers hold sums
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

// Numbers of type A in a vector, and in the two vectors that make the width of a panel.
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

// The type of lane numbers that go with a vector of A.
template <typename A>
struct IndexOf {
    using type = int32_t;
};
template <>
struct IndexOf<double> {
    using type = int64_t;
};

// `join` of all lanes, by halves: few roundings, always in one order.
template <typename A, int64_t Half = kLanes<A> / 2, typename Join>
INTERFORMER_INLINE A joined(Vector<A> x, Join&& join) {
    if constexpr (Half == 0) {
        return x[0];
    } else {
        Vector<typename IndexOf<A>::type> other;
#pragma GCC unroll 16
        for (int lane = 0; lane < kLanes<A>; ++lane) other[lane] = lane ^ Half;
        return joined<A, Half / 2>(join(x, __builtin_shuffle(x, other)), join);
    }
}
// What lanes are joined by. A NaN is never larger.
struct Plus {
    template <typename V>
    INTERFORMER_INLINE V operator()(V a, V b) const {
        return a + b;
    }
};
struct Larger {
    template <typename V>
    INTERFORMER_INLINE V operator()(V a, V b) const {
        return a > b ? a : b;
    }
};
template <typename A>
INTERFORMER_INLINE A most_of_lanes(Vector<A> x) {
    return joined<A>(x, Larger{});
}

inline int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}
inline int64_t most(int64_t a, int64_t b) {
    return a > b ? a : b;
}
inline int64_t round_up(int64_t x, int64_t multiple) {
    return (x + multiple - 1) / multiple * multiple;
}

template <typename A>
inline void fill(A* to, int64_t count, A value) {
    for (int64_t i = 0; i < count; ++i) to[i] = value;
}

INTERFORMER_LEVEL_END
