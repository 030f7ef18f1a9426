// Rotary embedding: of one token inside attention, and of packed tokens.
#pragma once

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
        A* x = static_cast<A*>(memory);
        for (int64_t row = first; row < last; ++row)
            for (int64_t t = 0; t < p.counts[row]; ++t) {
                const int64_t position = position_of(p.positions, p.begins[row], t);
                for (int64_t h = 0; h < p.heads; ++h) {
                    widen(address<T>(p.x, row, t, h), p.x.channel, p.head_size, x);
                    rotate(p.rope, position, p.backwards ? A(-1) : A(1), x);
                    narrow(x, p.head_size, address<T>(p.out, row, t, h));
                }
            }
    }
};

INTERFORMER_ISA_END
