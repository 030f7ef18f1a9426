// Rotary embedding: of one token inside attention, and of packed tokens.
#pragma once

#include <type_traits>

#include "cpu/kernel_table.h"
#include "cpu/kernels/memory.h"

INTERFORMER_ISA_BEGIN

// The position of a row's token: the given one, or its index.
inline int64_t position_of(const Positions& positions, int64_t row_begin, int64_t index) {
    if (positions.wide) return positions.wide[(row_begin + index) * positions.stride];
    if (positions.narrow) return positions.narrow[(row_begin + index) * positions.stride];
    return index;
}

// Rotates the pairs `x[c * STEP], other[c * STEP]`. The compiler vectorises this loop only with pointers that do not
// alias and a constant step.
template <int STEP, typename A>
inline void rotate_pairs(const float* __restrict cos, const float* __restrict sin, int64_t half, A sign,
                         A* __restrict x, A* __restrict other) {
    for (int64_t c = 0; c < half; ++c) {
        const A a = x[c * STEP], b = other[c * STEP], s = sign * A(sin[c]);
        x[c * STEP] = a * A(cos[c]) - b * s;
        other[c * STEP] = a * s + b * A(cos[c]);
    }
}

// Rotates the pairs of channels of one token by its position, clamped to the tables; a `sign` of -1 is the inverse.
template <typename A>
inline void rotate(const RotaryTables& rope, int64_t position, A sign, A* x) {
    const int64_t table_row = min(max(position, 0), rope.positions - 1);
    const float* cos = rope.cos + table_row * rope.cos_stride;
    const float* sin = rope.sin + table_row * rope.sin_stride;
    if (rope.interleaved)
        rotate_pairs<2>(cos, sin, rope.half, sign, x, x + 1);
    else
        rotate_pairs<1>(cos, sin, rope.half, sign, x, x + rope.half);
}

template <typename T>
class Rotary {
  public:
    using A = Acc<T>;

    static int64_t memory(const RotaryProblem& p) { return p.head_size * static_cast<int64_t>(sizeof(A)); }

    static void run(const RotaryProblem& p, int64_t first, int64_t last, void* memory) {
        const bool neighbours = p.x.channel == 1 && p.out.channel == 1;
        if (neighbours && !p.rope.interleaved && p.rope.half % W == 0)
            for_each_token(p, first, last, &halves);
        else if (neighbours && W >= 4 && p.rope.interleaved && p.rope.half % (W / 2) == 0)
            for_each_token(p, first, last, &pairs<true>);
        else if (neighbours && W >= 4 && !p.rope.interleaved && p.rope.half == W / 2)
            for_each_token(p, first, last, &pairs<false>);
        else
            for_each_token(p, first, last, [memory](const RotaryProblem& problem, const Token& token) {
                any(problem, token, static_cast<A*>(memory));
            });
    }

  private:
    static constexpr int64_t W = kLanes<A>;

    struct Token {
        const T* x;
        T* out;
        int64_t position;
        const float *cos, *sin;
    };

    template <typename Each>
    static void for_each_token(const RotaryProblem& p, int64_t first, int64_t last, Each each) {
        for (int64_t row = first; row < last; ++row)
            for (int64_t t = 0; t < p.counts[row]; ++t) {
                const int64_t position = position_of(p.positions, p.begins[row], t);
                const int64_t table_row = min(max(position, 0), p.rope.positions - 1);
                each(p, Token{address<T>(p.x, row, t, 0), address<T>(p.out, row, t, 0), position,
                              p.rope.cos + table_row * p.rope.cos_stride, p.rope.sin + table_row * p.rope.sin_stride});
            }
    }

    // Whole vectors of both halves of a head's channels.
    static void halves(const RotaryProblem& p, const Token& token) {
        const int64_t half = p.rope.half, heads = p.heads;
        for (int64_t c = 0; c < half; c += W) {
            const Vector<A> cos = angles(token.cos + c), sin = angles(token.sin + c) * direction(p);
            for (int64_t h = 0; h < heads; ++h) {
                const T* x = token.x + h * p.x.head + c;
                T* out = token.out + h * p.out.head + c;
                const Vector<A> a = load_wide(x), b = load_wide(x + half);
                store_wide(out, a * cos - b * sin);
                store_wide(out + half, a * sin + b * cos);
            }
        }
        copy_rest(p, token);
    }

    // Vectors that hold both numbers of each of their pairs: neighbours, or the two halves of a head of one vector.
    template <bool INTERLEAVED>
    static void pairs(const RotaryProblem& p, const Token& token) {
        Vector<typename IndexOf<A>::type> lanes, other, pair;
#pragma GCC unroll 16
        for (int lane = 0; lane < W; ++lane) {
            lanes[lane] = lane;
            other[lane] = lane ^ (INTERLEAVED ? 1 : W / 2);
            pair[lane] = INTERLEAVED ? lane / 2 : lane % (W / 2);
        }
        const int64_t channels = 2 * p.rope.half, heads = p.heads;
        for (int64_t c = 0; c < channels; c += W) {
            const Vector<A> cos = __builtin_shuffle(half_angles(token.cos + c / 2), pair);
            const Vector<A> up = __builtin_shuffle(half_angles(token.sin + c / 2), pair) * direction(p);
            const Vector<A> sin = lanes < other ? -up : up;
            for (int64_t h = 0; h < heads; ++h) {
                const Vector<A> x = load_wide(token.x + h * p.x.head + c);
                store_wide(token.out + h * p.out.head + c, x * cos + __builtin_shuffle(x, other) * sin);
            }
        }
        copy_rest(p, token);
    }

    static A direction(const RotaryProblem& p) { return p.backwards ? -1 : 1; }

    // A vector of a table's numbers, or half of one in the first lanes.
    static INTERFORMER_INLINE Vector<A> angles(const float* from) {
        typedef float Floats __attribute__((vector_size(W * sizeof(float))));
        Floats x;
        std::memcpy(&x, from, sizeof x);
        return __builtin_convertvector(x, Vector<A>);
    }
    static INTERFORMER_INLINE Vector<A> half_angles(const float* from) {
#if defined(__AVX512F__)  // without a way over memory, where a load would wait for a narrower store
        if constexpr (std::is_same_v<A, float>) return _mm512_maskz_loadu_ps(0xff, from);
#elif defined(__AVX2__) && !defined(INTERFORMER_WIDE)
        if constexpr (std::is_same_v<A, float>) return _mm256_zextps128_ps256(_mm_loadu_ps(from));
#endif
        A x[W] = {};
        for (int64_t i = 0; i < W / 2; ++i) x[i] = from[i];
        return load_vector(x);
    }

    // The channels that are not rotated.
    static void copy_rest(const RotaryProblem& p, const Token& token) {
        const int64_t first = 2 * p.rope.half;
        if (first == p.head_size) return;
        for (int64_t h = 0; h < p.heads; ++h)
            std::memcpy(token.out + h * p.out.head + first, token.x + h * p.x.head + first,
                        static_cast<size_t>(p.head_size - first) * sizeof(T));
    }

    static void any(const RotaryProblem& p, const Token& token, A* x) {
        for (int64_t h = 0; h < p.heads; ++h) {
            widen(token.x + h * p.x.head, p.x.channel, p.head_size, x);
            rotate(p.rope, token.position, p.backwards ? A(-1) : A(1), x);
            narrow(x, p.head_size, token.out + h * p.out.head);
        }
    }
};

INTERFORMER_ISA_END
