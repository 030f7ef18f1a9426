// What products multiply. Where the processor multiplies bfloat16 numbers by pairs that lie next to each other along
// the sum, tensors of that type stay as they are and one operand is a pair in one word. Everything else is widened to
// the type of accumulation, and one operand is one number.
#pragma once

#include <type_traits>

#include "cpu/kernels/elements.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

INTERFORMER_LEVEL_BEGIN

using Pair = uint32_t;  // the first number in the low half

// How numbers of a tensor of T are stored to be multiplied, and the operand.
template <typename T>
struct OperandOf {
    using stored = Acc<T>;
    using type = Acc<T>;
};
#ifdef INTERFORMER_PAIRS
template <>
struct OperandOf<BFloat16> {
    using stored = BFloat16;
    using type = Pair;
};
#endif
template <typename T>
using Stored = typename OperandOf<T>::stored;
template <typename T>
using Operand = typename OperandOf<T>::type;

// Numbers in an operand, operands that hold `count` numbers, and the type that products of operands are summed in.
template <typename X>
constexpr int64_t kNumbers = std::is_same_v<X, Pair> ? 2 : 1;
template <typename X>
inline int64_t operands(int64_t count) {
    return (count + kNumbers<X> - 1) / kNumbers<X>;
}
// Numbers between rows of channels: whole vectors of operands.
template <typename X>
inline int64_t padded(int64_t channels) {
    return round_up(channels, kNumbers<X> * kLanes<X>);
}
template <typename X>
using SumOf = std::conditional_t<std::is_same_v<X, Pair>, float, X>;

// Numbers in the high, or low, halves of pairs.
inline Vector<float> high_numbers(Vector<Pair> pairs) {
    const Vector<Pair> bits = pairs & 0xffff0000u;
    Vector<float> x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
inline Vector<float> low_numbers(Vector<Pair> pairs) {
    return high_numbers(pairs << 16);
}

// `x` is an operand, or a vector of them.
template <typename X, typename Factor>
INTERFORMER_INLINE void multiply_add(Vector<SumOf<X>>& sum, Factor x, Vector<X> row) {
    if constexpr (!std::is_same_v<X, Pair>) {
        sum += x * row;
    } else {
        const Vector<Pair> factors = Vector<Pair>{} + x;
#ifdef __AVX512BF16__
        sum = _mm512_dpbf16_ps(sum, (__m512bh)factors, (__m512bh)row);
#else
        sum += high_numbers(factors) * high_numbers(row);
        sum += low_numbers(factors) * low_numbers(row);
#endif
    }
}

// A matrix read one operand at a time.
template <typename X>
struct Scalars {
    const X* data;
    int64_t row, column;  // strides

    Scalars from(int64_t m, int64_t k) const { return {data + m * row + k * column, row, column}; }
};

// A matrix whose rows are read by the vector; rows are `stride` apart.
template <typename X>
struct Matrix {
    X* data;
    int64_t stride;

    Matrix from(int64_t row) const { return {data + row * stride, stride}; }
};

// A matrix of stored numbers to be summed along its columns.
template <typename X, typename S>
inline Matrix<const X> along_columns(Matrix<const S> x) {
    return {reinterpret_cast<const X*>(x.data), x.stride / kNumbers<X>};
}
template <typename X, typename S>
inline Scalars<X> scalars_along_columns(Matrix<const S> x) {
    const Matrix<const X> words = along_columns<X>(x);
    return {words.data, words.stride, 1};
}

// A matrix [rows, columns] of stored numbers to be summed along its rows: itself, or a copy whose rows are pairs of its
// rows (a last row without another one is paired with zeros).
template <typename X, typename S>
inline Matrix<const X> along_rows(Matrix<const S> x, int64_t rows, int64_t columns, X* copy) {
    if constexpr (std::is_same_v<X, S>) {
        return x;
    } else {
        const int64_t stride = round_up(columns, kLanes<X>);
        for (int64_t i = 0; i < rows; i += 2) {
            const S *first = x.from(i).data, *second = first + x.stride;
            X* to = copy + i / 2 * stride;
            if (i + 1 < rows)
                for (int64_t c = 0; c < columns; ++c) to[c] = first[c].bits | static_cast<X>(second[c].bits) << 16;
            else
                for (int64_t c = 0; c < columns; ++c) to[c] = first[c].bits;
            fill(to + columns, stride - columns, X(0));
        }
        return {copy, stride};
    }
}

// ---------------------------------------------------------------- numbers that were computed, as operands

// Bits of the bfloat16 numbers nearest to x (ties to even), in the high halves; the low halves are to be cut off.
inline Vector<Pair> rounded_bits(Vector<float> x) {
    Vector<Pair> bits;
    std::memcpy(&bits, &x, sizeof bits);
    const Vector<Pair> rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    return x != x ? bits | 0x400000u : rounded;  // a NaN stays one
}

inline Vector<Pair> pairs_of(Vector<float> first, Vector<float> second) {
    return rounded_bits(first) >> 16 | (rounded_bits(second) & 0xffff0000u);
}

// The numbers of two vectors, one after the other, in pairs of neighbours.
inline Vector<Pair> neighbours(Vector<float> before, Vector<float> after) {
#ifdef __AVX512BF16__
    return (Vector<Pair>)_mm512_cvtne2ps_pbh(after, before);
#else
    Vector<int32_t> even;
    for (int lane = 0; lane < kLanes<float>; ++lane) even[lane] = 2 * lane;
    return pairs_of(__builtin_shuffle(before, after, even), __builtin_shuffle(before, after, even + 1));
#endif
}

// Numbers [begin, end) of a row, multiples of the vector, become operands of a sum along the row, written from
// `begin / kNumbers` on: in the same memory where that is `row`.
template <typename X, typename A>
inline void pair_columns(const A* row, int64_t begin, int64_t end, A* to) {
    if constexpr (!std::is_same_v<X, A>) {
        constexpr int64_t W = kLanes<A>;
        for (int64_t j = begin; j < end; j += 2 * W) {
            const Vector<A> after = j + W < end ? load_vector(row + j + W) : Vector<A>{};
            const Vector<X> words = neighbours(load_vector(row + j), after);
            std::memcpy(to + j / 2, &words, sizeof words);
        }
    }
}

// Columns [begin, end), multiples of the vector, of `rows` rows become operands of a sum along the columns, in the
// memory of the first row of each pair.
template <typename X, typename A>
inline void pair_rows(Matrix<A> x, int64_t rows, int64_t begin, int64_t end) {
    if constexpr (!std::is_same_v<X, A>)
        for (int64_t i = 0; i < rows; i += 2)
            for (int64_t j = begin; j < end; j += kLanes<A>) {
                A* first = x.from(i).data + j;
                const Vector<X> words =
                    pairs_of(load_vector(first), i + 1 < rows ? load_vector(first + x.stride) : Vector<A>{});
                std::memcpy(first, &words, sizeof words);
            }
}

// What `pair_columns` or `pair_rows` made of `x`.
template <typename X, typename A>
inline const X* operands_in(const A* x) {
    return reinterpret_cast<const X*>(x);
}

INTERFORMER_LEVEL_END
