// What the attention kernels share: tokens taken by the tile, and the softmax over a row that is seen tile by tile.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/tensor_view.h"
#include "cpu/element.h"
#include "cpu/rows.h"

namespace interformer {

// Tokens of a tile. Sums run over a tile first and over the row's tiles then, so that long rows stay exact.
constexpr int64_t kTile = 64;

// One head's channels of the tokens of a tile, in the type of accumulation.
template <typename A>
struct Tile {
    const A* data;
    int64_t stride;

    const A* operator[](int64_t token) const { return data + token * stride; }
};

// A tile of packed tokens `x [T, Hk, channels]`: in place where the type allows it, else converted into `buffer`.
template <typename T>
Tile<Acc<T>> tile_of(const Strided<const T, 3>& x, Span tokens, int64_t head, int64_t channels, Acc<T>* buffer) {
    if constexpr (std::is_same_v<T, Acc<T>>) {
        return {x.at(tokens.begin, head), x.strides[0]};
    } else {
        for (int64_t t = tokens.begin; t < tokens.end; ++t)
            widen(x.at(t, head), 1, channels, buffer + (t - tokens.begin) * channels);
        return {buffer, channels};
    }
}

// Calls `body(tokens)` for the tiles of a span, in order.
template <typename Body>
void for_tiles(Span span, Body&& body) {
    for (int64_t first = span.begin; first < span.end; first += kTile)
        body(Span{first, first + kTile < span.end ? first + kTile : span.end});
}

// The softmax of one query: the largest score so far, and the sum of the exponentials against it.
template <typename A>
struct RunningSoftmax {
    A largest = -std::numeric_limits<A>::infinity();
    A sum = 0;

    // Turns a tile's scores into weights, to be divided by `sum` at the end; what was summed with the weights of
    // earlier tiles is to be multiplied by the result.
    A soften(A* scores, int64_t count) {
        A next = largest;
        for (int64_t t = 0; t < count; ++t)  // a NaN wins, and stays
            if (scores[t] > next || scores[t] != scores[t]) next = scores[t];
        const A shrink = next == largest ? A(1) : std::exp(largest - next);
        largest = next;
        exponentials(scores, count);
        A added = 0;
        for (int64_t t = 0; t < count; ++t) added += scores[t];
        sum = sum * shrink + added;
        return shrink;
    }

    // Scores to weights against the largest score. While every score is -inf the weights are 0, since a finite score
    // may follow; if none does, 0 / 0 is NaN at the end.
    void exponentials(A* scores, int64_t count) const {
        const A against = largest == -std::numeric_limits<A>::infinity() ? A(0) : largest;
        for (int64_t t = 0; t < count; ++t) scores[t] = std::exp(scores[t] - against);
    }

    // As torch.logsumexp: infinite where the largest score is, -inf where there was none.
    A log_sum() const { return std::isinf(largest) ? largest : largest + std::log(sum); }
};

}  // namespace interformer
