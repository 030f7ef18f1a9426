// A call of the attention family as its kernels see it: where queries and keys of a row lie, and which of them meet.
//
// Query heads that read the same key/value head go together. Their queries are numbered token by token, the heads of a
// token side by side: unit `u` of a row is token `u / group` under head `u % group` of those. Units are what warps take
// 16 of; with few tokens and many heads to a key/value head, such a tile is still full.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common/attention_call.h"
#include "cuda/elements.h"
#include "cuda/rows.cuh"

namespace interformer {
namespace cuda {

// A tensor of heads: of packed tokens (`row` is 0 then), or of tokens of each row.
template <typename T>
struct Heads {
    T* data = nullptr;
    int64_t row = 0, token = 0, head = 0, channel = 1;
    int alignment = 16;

    Heads() = default;
    explicit Heads(const TensorView& x)
        : data(static_cast<T*>(x.data)),
          row(x.axes > 3 ? x.strides[0] : 0),
          token(x.strides[x.axes - 3]),
          head(x.strides[x.axes - 2]),
          channel(x.strides[x.axes - 1]),
          alignment(alignment_of(x)) {}

    __device__ T* at(int64_t r, int64_t t, int64_t h) const { return data + r * row + t * token + h * head; }
};

// Query tokens of a row. In tensors of their layout the first one is token `origin` of row `row`; outputs are numbered
// over all rows, and `first` is its number there.
struct Queries {
    int64_t row, origin, first;
    int count;
};

// Key tokens of a row behind the skipped ones.
struct Keys {
    int64_t first;
    int count;
};

// 16 units and those behind them, of one row under one key/value head.
struct Units {
    int token, head;    // of the first one; the head among all heads
    int passed, group;  // heads of its token before it

    struct Unit {
        int token, head;
    };
    __device__ Units(int64_t begin, int kv_head, int group)
        : token(static_cast<int>(begin / group)),
          head(kv_head * group),
          passed(static_cast<int>(begin % group)),
          group(group) {}
    __device__ Unit operator[](int r) const {
        const int u = passed + r, tokens = group == 1 ? u : u / group;
        return {token + tokens, head + u - tokens * group};
    }
};

// ---------------------------------------------------------------- which queries see which keys

// Keys that a query sees: [from, to), and those before `prefix`.
struct Sight {
    int from, to, prefix;

    __device__ bool sees(int key) const { return (key >= from && key < to) || key < prefix; }
    __device__ bool sees_any() const { return from < to || prefix > 0; }
};

// Tiles [0, before) and [start, stop).
struct TileRange {
    int before, start, stop;

    __device__ int count() const { return before + stop - start; }
    __device__ int operator[](int step) const { return step < before ? step : start + step - before; }
    __device__ bool holds(int tile) const { return tile < before || (tile >= start && tile < stop); }
    // Of [start, stop) only what lies in [from, to).
    __device__ TileRange within(int from, int to) const {
        const int first = max(start, from);
        return {before, first, max(min(stop, to), first)};
    }
};

// -1: open.
struct Masks {
    int left, right, prefix;
    bool causal;

    // Of query token `n` of a row. A token that the row does not have sees nothing.
    __device__ Sight sight(int n, int queries, int keys) const {
        if (n >= queries) return {0, 0, 0};
        Sight found{0, keys, min(prefix, keys)};
        if (n < prefix) return found;
        const int here = n + (keys - queries);
        if (causal) found.to = min(found.to, here + 1);
        if (right >= 0 && here + 1 <= keys - right) found.to = min(found.to, here + 1 + right);
        if (left >= 0 && here > left) found.from = here - left;
        return found;
    }

    // Tiles of `tile` keys that some of the query tokens [first, last] see.
    __device__ TileRange key_tiles(int first, int last, int queries, int keys, int tile) const {
        const Sight begin = sight(first, queries, keys), end = sight(min(last, queries - 1), queries, keys);
        const int before = (begin.prefix + tile - 1) / tile, start = max(begin.from / tile, before);
        return {before, start, max((max(max(begin.to, end.to), 0) + tile - 1) / tile, start)};
    }

    // Tiles of `tile` units of queries that see some of the keys [first, last].
    __device__ TileRange query_tiles(int first, int last, int queries, int keys, int group, int tile) const {
        const int64_t shift = int64_t{keys} - queries, units = int64_t{queries} * group;
        int64_t begin = 0, end = queries, before = 0;
        if (causal) begin = max(begin, first - shift);
        if (right >= 0) begin = max(begin, first - shift - right);
        if (left >= 0) end = min(end, last - shift + left + 1);
        if (prefix > 0) {
            before = (min(int64_t{prefix} * group, units) + tile - 1) / tile;
            if (first < prefix) begin = 0, end = queries;
        }
        const int64_t start = max(begin * group / tile, before);
        const int64_t stop = max((max(end, int64_t{0}) * group + tile - 1) / tile, start);
        return {static_cast<int>(before), static_cast<int>(start), static_cast<int>(stop)};
    }
};

// ---------------------------------------------------------------- the call

template <typename T>
struct AttentionProblem {
    Offsets q_offsets, kv_offsets;  // those of queries only where they are packed
    QueryLayout layout;
    bool one_offsets;  // of queries and keys alike
    int heads, kv_heads, group;
    int queries;  // of each row, where they are not packed
    int channels, value_channels;
    int skip;  // keys at the start of each row
    Masks masks;
    Heads<const T> q, k, v;
    bool v_is_k;
    float scale;
    // Factors of post_scale: of a weight (in the backward, of the gradient of A), and of sums over weights.
    float inner_scale, outer_scale;
    // Factors of scale in gradients of queries and keys: of dS, and of sums over dS.
    float slope_scale, rest_scale;
    Score score;

    explicit AttentionProblem(const AttentionInputs& in);

    // The score of a query's product with a key, rounded here in every pass: a compiler that joined it with what comes
    // after would make large scores other numbers in one pass than in the next.
    __device__ float scored(float product) const { return __fmul_rn(product, scale); }

    int64_t rows() const { return kv_offsets.rows; }
    int64_t query_tokens() const { return layout == QueryLayout::packed ? q_offsets.tokens : rows() * queries; }
    // Of a row, on average.
    int64_t mean_units() const {
        if (layout != QueryLayout::packed) return int64_t{queries} * group;
        return q_offsets.tokens * group / (rows() > 0 ? rows() : 1);
    }
    int64_t mean_keys() const { return kv_offsets.tokens / (rows() > 0 ? rows() : 1); }
    // Tiles of `block` units, those of idle slots with them, of so many rows (the batch's, or runs of it).
    int64_t query_slots(int64_t of_rows, int block) const {
        if (layout == QueryLayout::packed) return slots(q_offsets.tokens, of_rows, group, block);
        return of_rows * tiles_of_row(block);
    }
    __host__ __device__ int64_t tiles_of_row(int block) const { return (int64_t{queries} * group + block - 1) / block; }

    // Of a row of the batch, as its offsets have it.
    __device__ Queries queries_of(int64_t row) const {
        return layout == QueryLayout::packed ? packed_queries(q_offsets.span(row))
                                             : Queries{row, 0, row * queries, queries};
    }
    // Beside keys of a row that was searched for: the same span, where both sides have the same offsets.
    __device__ Queries queries_beside(const Span& keys) const {
        return one_offsets ? packed_queries(keys) : queries_of(keys.row);
    }
    __device__ Queries packed_queries(const Span& row) const { return {row.row, row.first, row.first, row.count}; }

    // Of a row; the tail has none.
    __device__ Keys keys_of(const Span& row) const {
        if (row.row >= kv_offsets.rows) return {0, 0};
        return {row.first + skip, max(row.count - skip, 0)};
    }
    __device__ Keys keys_of(int64_t row) const { return keys_of(kv_offsets.span(row)); }
    // The same, beside queries.
    __device__ Keys keys_beside(const Span& queries) const {
        return one_offsets ? keys_of(queries) : keys_of(queries.row);
    }
};

inline int clamped(int64_t limit) {
    return static_cast<int>(limit < INT32_MAX ? limit : INT32_MAX);
}

// The part of a `post_scale` that weights are multiplied by before they are summed up: all of it where it makes them
// smaller, so that a sum does not overflow which is finite after it. But small weights of float16, as operands, lose
// digits.
template <typename T>
double inner_part(double post_scale) {
    constexpr double least = std::is_same_v<T, Float16> ? 1.0 / 64 : 0.0;
    const double size = std::abs(post_scale);
    return size > 1.0 ? 1.0 : size < least ? least : post_scale;
}
template <typename T>
double outer_part(double post_scale) {
    const double inner = inner_part<T>(post_scale);
    return inner == post_scale ? 1.0 : post_scale / inner;
}

// Whether gradients of scores are multiplied by `scale` before sums over them, likewise.
template <typename T>
bool is_safer_inside(double scale) {
    return !std::is_same_v<T, Float16> && std::abs(scale) <= 1.0;
}

template <typename T>
AttentionProblem<T>::AttentionProblem(const AttentionInputs& in)
    : q_offsets(in.layout == QueryLayout::packed && in.q_offsets ? *in.q_offsets : in.kv_offsets, in.q.shape[0]),
      kv_offsets(in.kv_offsets, in.k.shape[0]),
      layout(in.layout),
      one_offsets(in.layout == QueryLayout::packed && !in.q_offsets),
      heads(static_cast<int>(in.q.shape[in.q.axes - 2])),
      kv_heads(static_cast<int>(in.k.shape[1])),
      group(heads / kv_heads),
      queries(in.layout == QueryLayout::packed ? 0 : static_cast<int>(in.q.shape[in.q.axes - 3])),
      channels(static_cast<int>(in.k.shape[2])),
      value_channels(static_cast<int>((in.v ? *in.v : in.k).shape[2])),
      skip(clamped(in.skip_prefix)),
      masks{clamped(in.window_left), clamped(in.window_right), clamped(in.num_prefix), in.causal},
      q(in.q),
      k(in.k),
      v(in.v ? *in.v : in.k),
      v_is_k(!in.v),
      scale(static_cast<float>(in.scale)),
      inner_scale(in.score.softmax ? 1.0f : static_cast<float>(inner_part<T>(in.post_scale))),
      outer_scale(in.score.softmax ? 1.0f : static_cast<float>(outer_part<T>(in.post_scale))),
      slope_scale(is_safer_inside<T>(in.scale) ? scale : 1.0f),
      rest_scale(is_safer_inside<T>(in.scale) ? 1.0f : scale),
      score(in.score) {}

}  // namespace cuda
}  // namespace interformer
