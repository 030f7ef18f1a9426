// Products of attention with a tile of queries in the lanes of vectors: one vector of queries, or two.
//
// Scores are [key, query]: numbers of keys are broadcast, where they lie in memory, and queries are read by the vector,
// transposed. Sums of values are [query, channel]: probabilities are broadcast, down the columns of the scores, and
// values are read by the vector, where they lie in memory. So nothing but queries is transposed or padded.
#pragma once

#include "cpu/kernels/multiply.h"

INTERFORMER_ISA_BEGIN

// Probabilities of a tile: row m is a query, column k a key. It is its own cursor.
template <typename X, int64_t STRIDE>
struct ProbScalars {
    const X* data;

    ProbScalars from(int64_t m, int64_t k) const { return {data + m + k * STRIDE}; }
    template <int M>
    INTERFORMER_INLINE ProbScalars cursor() const {
        return *this;
    }
    INTERFORMER_INLINE X operator[](int m) const { return data[m]; }
    INTERFORMER_INLINE void advance() { data += STRIDE; }
};

// scores[key, N vectors] = keys . queries; `queries` is [depth, N vectors].
template <typename X, int N>
inline void lane_scores(Scalars<X> keys, const X* queries, int64_t count, int64_t depth, SumOf<X>* scores) {
    constexpr int64_t kStride = N * kLanes<X>, kStepDepth = 64;  // a long sum is made in steps
    for (int64_t k = 0; k < depth; k += kStepDepth)
        multiply_columns<X, N>(keys.from(0, k), queries + k * kStride, kStride, count, min(kStepDepth, depth - k),
                               {scores, kStride}, k > 0);
}

// sums[query, channel] (+)= probs . values, over `depth` operands along the keys; `probs` is [depth, N vectors].
template <typename X, int N>
inline void lane_sums(const X* probs, Matrix<const X> values, int64_t count, int64_t columns, int64_t depth,
                      Matrix<SumOf<X>> sums, bool add) {
    const ProbScalars<X, N * kLanes<X>> a{probs};
    multiply<X>(a, values, count, columns, depth, sums, add);
}

// A vector of operands from channels as they lie in memory; with less than a vector left (pairs only), zeros follow.
template <typename X, typename T>
INTERFORMER_INLINE Vector<X> load_operands(const T* channels, int64_t left) {
    if constexpr (!std::is_same_v<X, Pair>) {
        return load_wide(channels);
    } else {
        const X* words = reinterpret_cast<const X*>(channels);
        return left < kLanes<X> ? load_first(words, left) : load_vector(words);
    }
}

// Transposes a vector of queries: operand (lane i, k) of `depth` goes to `to[k * stride + i]`. Without pairs, `depth`
// is a multiple of the vector.
template <typename X, typename T>
inline void transpose_queries(const T* const* lanes, int64_t depth, X* to, int64_t stride) {
    constexpr int64_t W = kLanes<X>;
    for (int64_t k = 0; k < depth; k += W) {
        Vector<X> square[W];
#pragma GCC unroll 16
        for (int64_t i = 0; i < W; ++i) square[i] = load_operands<X>(lanes[i] + k * kNumbers<X>, depth - k);
        transpose_square<X>(square);
#pragma GCC unroll 16
        for (int64_t i = 0; i < W; ++i) store_vector(to + (k + i) * stride, square[i]);
    }
}

INTERFORMER_ISA_END
