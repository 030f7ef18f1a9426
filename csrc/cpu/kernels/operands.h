// The operands of matrix products. Where the processor multiplies pairs of bfloat16 numbers that are neighbours along
// the sum, tensors of that type stay as they are and an operand is a pair in one word. Every other type is widened to
// the accumulation type, and an operand is one number.
#pragma once

#include <type_traits>

#include "cpu/kernels/elements.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

INTERFORMER_ISA_BEGIN

using Pair = uint32_t;  // the first number in the low half

// For a tensor of T: the type in which its numbers are stored for products, and the type of an operand.
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

// The numbers in an operand, the operands that hold `count` numbers, and the type in which products are summed.
template <typename X>
constexpr int64_t kNumbers = std::is_same_v<X, Pair> ? 2 : 1;
template <typename X>
inline int64_t operands(int64_t count) {
    return (count + kNumbers<X> - 1) / kNumbers<X>;
}
// The numbers between rows of channels: whole vectors of operands.
template <typename X>
inline int64_t padded(int64_t channels) {
    return round_up(channels, kNumbers<X> * kLanes<X>);
}
// Whether rows of stored numbers that begin at `first`, `stride` apart, begin where an operand may.
template <typename X, typename S>
inline bool whole_operands(const S* first, int64_t stride) {
    return kNumbers<X> == 1 || (stride % kNumbers<X> == 0 && reinterpret_cast<uintptr_t>(first) % sizeof(X) == 0);
}
template <typename X>
using SumOf = std::conditional_t<std::is_same_v<X, Pair>, float, X>;

// The first `count` of a vector; further lanes are 0.
inline Vector<Pair> load_first(const Pair* from, int64_t count) {
#ifdef __AVX512BF16__
    return (Vector<Pair>)_mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << count) - 1), from);
#else
    Vector<Pair> x{};
    std::memcpy(&x, from, static_cast<size_t>(count) * sizeof(Pair));
    return x;
#endif
}

// The numbers in the high, or low, halves of pairs.
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
template <typename X, typename Multiplier>
INTERFORMER_INLINE void multiply_add(Vector<SumOf<X>>& sum, Multiplier x, Vector<X> row) {
    if constexpr (!std::is_same_v<X, Pair>) {
        sum += x * row;
    } else {
        const Vector<Pair> pairs = Vector<Pair>{} + x;
#ifdef __AVX512BF16__
        sum = _mm512_dpbf16_ps(sum, (__m512bh)pairs, (__m512bh)row);
#else
        sum += high_numbers(pairs) * high_numbers(row);
        sum += low_numbers(pairs) * low_numbers(row);
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

// A vector of numbers in the low halves of pairs.
inline Vector<Pair> halves(const BFloat16* from) {
    typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
    Halves bits;
    std::memcpy(&bits, from, sizeof bits);
    return __builtin_convertvector(bits, Vector<Pair>);
}

// A matrix [rows, columns] of stored numbers to be summed along its rows: itself, or a copy whose rows are pairs of its
// rows. A last row without a partner is paired with zeros.
template <typename X, typename S>
inline Matrix<const X> along_rows(Matrix<const S> x, int64_t rows, int64_t columns, X* copy) {
    if constexpr (std::is_same_v<X, S>) {
        return x;
    } else {
        const int64_t stride = round_up(columns, kLanes<X>);
        for (int64_t i = 0; i < rows; i += 2) {
            const S *first = x.from(i).data, *second = first + x.stride;
            X* to = copy + i / 2 * stride;
            int64_t c = 0;
            for (; c + kLanes<X> <= columns; c += kLanes<X>) {
                const Vector<X> high = i + 1 < rows ? halves(second + c) << 16 : Vector<X>{};
                store_vector(to + c, halves(first + c) | high);
            }
            for (; c < columns; ++c)
                to[c] = first[c].bits | (i + 1 < rows ? static_cast<X>(second[c].bits) << 16 : X(0));
            fill(to + columns, stride - columns, X(0));
        }
        return {copy, stride};
    }
}

// ---------------------------------------------------------------- computed numbers as operands

// The bits of the bfloat16 numbers nearest to x (ties to even) in the high halves. The low halves have no meaning.
inline Vector<Pair> rounded_bits(Vector<float> x) {
    Vector<Pair> bits;
    std::memcpy(&bits, &x, sizeof bits);
    const Vector<Pair> rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    return x != x ? bits | 0x400000u : rounded;  // a NaN stays one
}

inline Vector<Pair> pairs_of(Vector<float> first, Vector<float> second) {
    return rounded_bits(first) >> 16 | (rounded_bits(second) & 0xffff0000u);
}

// The same, where subnormal numbers may become 0.
inline Vector<Pair> rounded_pairs(Vector<float> first, Vector<float> second) {
#ifdef __AVX512BF16__
    uint16_t lanes __attribute__((vector_size(64)));
    for (int lane = 0; lane < 32; ++lane) lanes[lane] = static_cast<uint16_t>(lane % 2 * 16 + lane / 2);
    return (Vector<Pair>)_mm512_permutexvar_epi16((__m512i)lanes, (__m512i)_mm512_cvtne2ps_pbh(second, first));
#else
    return pairs_of(first, second);
#endif
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

// Turns the numbers [begin, end) of a row, multiples of the vector, into operands of a sum along the row, written from
// `begin / kNumbers` on. `to` may be `row`.
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

// Turns the columns [begin, end), multiples of the vector, of `rows` rows into operands of a sum along the columns, in
// the memory of the first row of each pair.
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

// The operands that `pair_columns` or `pair_rows` wrote to `x`.
template <typename X, typename A>
inline const X* operands_in(const A* x) {
    return reinterpret_cast<const X*>(x);
}

INTERFORMER_ISA_END
