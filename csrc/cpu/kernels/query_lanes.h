// Products of attention with a tile of queries in the lanes of vectors: one vector of queries, or two.
//
// Scores are [key, query]: numbers of keys are broadcast, where they lie in memory, and queries are read by the vector,
// transposed. Sums of values are [query, channel]: probabilities are broadcast, down the columns of the scores, and
// values are read by the vector, where they lie in memory. So nothing but queries is transposed or padded.
#pragma once

#include "cpu/kernels/multiply.h"

INTERFORMER_ISA_BEGIN

// The numbers of M keys at one channel. A pointer and a stride reach 3 keys. Left alone, the compiler keeps a
// pointer for each, which are more than it has registers.
template <typename X, int M>
class KeyCursor {
  public:
    INTERFORMER_INLINE KeyCursor(const X* first, int64_t stride) : stride_(stride * static_cast<int64_t>(sizeof(X))) {
#pragma GCC unroll 8
        for (int i = 0; i < kPointers; ++i) at_[i] = reinterpret_cast<const char*>(first) + 3 * i * stride_;
    }
    INTERFORMER_INLINE X operator[](int m) const {
        X x;
        std::memcpy(&x, at_[m / 3] + m % 3 * stride_, sizeof x);
        return x;
    }
    INTERFORMER_INLINE void advance() {
#pragma GCC unroll 8
        for (int i = 0; i < kPointers; ++i) {
            at_[i] += sizeof(X);
            asm("" : "+r"(at_[i]));
        }
    }

  private:
    static constexpr int kPointers = (M + 2) / 3;
    const char* at_[kPointers];
    int64_t stride_;
};

// Numbers of keys: row m is a key, column k a channel.
template <typename X>
struct KeyScalars {
    const X* data;
    int64_t stride;

    KeyScalars from(int64_t m, int64_t k) const { return {data + m * stride + k, stride}; }
    template <int M>
    INTERFORMER_INLINE KeyCursor<X, M> cursor() const {
        return {data, stride};
    }
};

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

// C[m, n] (+)= sum over k of a[m, k] * B[k, n] for M rows and N vectors of columns.
template <typename X, int M, int N, typename Scalars>
void lane_tile(Scalars a, const X* b, int64_t b_stride, int64_t depth, SumOf<X>* c, int64_t c_stride, bool add) {
    using A = SumOf<X>;
    constexpr int64_t W = kLanes<X>;
    Vector<A> sum[M][N];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sum[m][n] = Vector<A>{};
    auto at = a.template cursor<M>();
    for (int64_t k = 0; k < depth; ++k, at.advance(), b += b_stride) {
        Vector<X> row[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) row[n] = load_vector(b + n * W);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const X x = at[m];
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) multiply_add<X>(sum[m][n], x, row[n]);
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            A* to = c + m * c_stride + n * W;
            // The earlier sum is added last, so that the error of a long sum grows with its steps, not its terms.
            store_vector(to, add ? load_vector(to) + sum[m][n] : sum[m][n]);
        }
}

// The same for `rows` of [1, M].
template <typename X, int M, int N, typename Scalars>
inline void lane_rows(int64_t rows, Scalars a, const X* b, int64_t b_stride, int64_t depth, SumOf<X>* c,
                      int64_t c_stride, bool add) {
    if (rows == M) return lane_tile<X, M, N>(a, b, b_stride, depth, c, c_stride, add);
    if constexpr (M > 1) lane_rows<X, M - 1, N>(rows, a, b, b_stride, depth, c, c_stride, add);
}

// The rows of a tile of N vectors of columns.
template <int N>
constexpr int64_t kLaneRows = N == 1 ? kTileRows + kTileRows / 3 : kTileRows;

// Any number of rows, in tiles of nearly equal height.
template <typename X, int N, typename Scalars>
void lane_columns(Scalars a, const X* b, int64_t b_stride, int64_t rows, int64_t depth, SumOf<X>* c, int64_t c_stride,
                  bool add) {
    constexpr int64_t kRows = kLaneRows<N>;
    for (int64_t tiles = (rows + kRows - 1) / kRows; tiles > 0; --tiles) {
        const int64_t m = tiles == 1 ? rows : (rows + tiles - 1) / tiles;
        lane_rows<X, kRows, N>(m, a, b, b_stride, depth, c, c_stride, add);
        a = a.from(m, 0);
        c += m * c_stride;
        rows -= m;
    }
}

// scores[key, N vectors] = keys . queries; `queries` is [depth, N vectors].
template <typename X, int N>
inline void lane_scores(KeyScalars<X> keys, const X* queries, int64_t count, int64_t depth, SumOf<X>* scores) {
    constexpr int64_t kStride = N * kLanes<X>, kStepDepth = 64;  // a long sum is made in steps
    for (int64_t k = 0; k < depth; k += kStepDepth)
        lane_columns<X, N>(keys.from(0, k), queries + k * kStride, kStride, count, min(kStepDepth, depth - k), scores,
                           kStride, k > 0);
}

// sums[query, channel] (+)= probs . values, over `depth` operands along the keys; `probs` is [depth, N vectors].
template <typename X, int N>
inline void lane_sums(const X* probs, Matrix<const X> values, int64_t count, int64_t columns, int64_t depth,
                      Matrix<SumOf<X>> sums, bool add) {
    const ProbScalars<X, N * kLanes<X>> a{probs};
    int64_t c = 0;
    for (; c + kPanel<X> <= columns; c += kPanel<X>)
        lane_columns<X, 2>(a, values.data + c, values.stride, count, depth, sums.data + c, sums.stride, add);
    if (c < columns)
        lane_columns<X, 1>(a, values.data + c, values.stride, count, depth, sums.data + c, sums.stride, add);
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
