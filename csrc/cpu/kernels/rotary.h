// Rotary embedding: of one token, as attention uses it, and of packed tokens.
#pragma once

#include "cpu/kernels.h"
#include "cpu/kernels/memory.h"

INTERFORMER_LEVEL_BEGIN

// Position of a row's token: given, or its index.
inline int64_t position_of(const Positions& given, int64_t row_begin, int64_t index) {
    if (given.wide) return given.wide[(row_begin + index) * given.stride];
    if (given.narrow) return given.narrow[(row_begin + index) * given.stride];
    return index;
}

// Pairs `x[c * STEP], other[c * STEP]`, turned. Nothing has two names, and the step is known: else the compiler turns
// pair by pair.
template <int STEP, typename A>
inline void turn_pairs(const float* __restrict cos, const float* __restrict sin, int64_t half, A sign, A* __restrict x,
                       A* __restrict other) {
    for (int64_t c = 0; c < half; ++c) {
        const A a = x[c * STEP], b = other[c * STEP], s = sign * A(sin[c]);
        x[c * STEP] = a * A(cos[c]) - b * s;
        other[c * STEP] = a * s + b * A(cos[c]);
    }
}

// Rotates the pairs of channels of one token by its position, clamped to the tables; `sign` -1 turns them back.
template <typename A>
inline void turn(const RotaryTables& rope, int64_t position, A sign, A* x) {
    const int64_t place = least(most(position, 0), rope.positions - 1);
    const float* cos = rope.cos + place * rope.cos_stride;
    const float* sin = rope.sin + place * rope.sin_stride;
    if (rope.interleaved)
        turn_pairs<2>(cos, sin, rope.half, sign, x, x + 1);
    else
        turn_pairs<1>(cos, sin, rope.half, sign, x, x + rope.half);
}

template <typename T>
class Rotary {
  public:
    using A = Acc<T>;

    static int64_t memory(const RotaryProblem& p) { return p.head_size * static_cast<int64_t>(sizeof(A)); }

    static void run(const RotaryProblem& p, int64_t first, int64_t last, void* memory) {
        A* x = static_cast<A*>(memory);
        for (int64_t row = first; row < last; ++row)
            for (int64_t t = 0; t < p.counts[row]; ++t) {
                const int64_t position = position_of(p.positions, p.begins[row], t);
                for (int64_t h = 0; h < p.heads; ++h) {
                    widen(address<T>(p.x, row, t, h), p.x.channel, p.head_size, x);
                    turn(p.rope, position, p.backwards ? A(-1) : A(1), x);
                    narrow(x, p.head_size, address<T>(p.out, row, t, h));
                }
            }
    }
};

INTERFORMER_LEVEL_END
