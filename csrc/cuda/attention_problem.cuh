// A call of the attention family as its kernels read it: where queries and keys of a row lie, and the variant.
//
// The query heads that read one key/value head are packed (packed GQA): packed row `p` of a row of the batch is query
// token `p / q_per_kv` under head `p % q_per_kv` of these heads. A warp takes 16 packed rows, so its tile is full even
// where a row has few tokens, if many query heads read one key/value head.
#pragma once

#include <cstdint>

#include "common/attention_call.h"
#include "cuda/attention_options.cuh"
#include "cuda/attention_rope.cuh"
#include "cuda/attention_variant.cuh"
#include "cuda/elements.h"
#include "cuda/rows.cuh"

namespace interformer {
namespace cuda {

// A tensor `[tokens, heads, channels]`, where `row` is 0, or `[rows, tokens, heads, channels]`.
template <typename T>
struct Heads {
    T* data = nullptr;
    int64_t row = 0, token = 0, head = 0, channel = 1;
    int alignment = 16;
    bool aligned = false;  // vectors of four numbers are

    Heads() = default;
    explicit Heads(const TensorView& x)
        : data(static_cast<T*>(x.data)),
          row(x.axes > 3 ? x.strides[0] : 0),
          token(x.strides[x.axes - 3]),
          head(x.strides[x.axes - 2]),
          channel(x.strides[x.axes - 1]),
          alignment(copy_alignment(x, x.axes - 3)),
          aligned(channel == 1 && alignment >= 4 * static_cast<int>(sizeof(T))) {}

    __device__ T* at(int64_t r, int64_t t, int64_t h) const { return data + r * row + t * token + h * head; }
};

// Query tokens of a row. In tensors of the queries' layout the first one is token `origin` of row `row`; `first` is its
// number among the outputs of all rows.
struct Queries {
    int64_t row, origin, first;
    int count;
};

// Key tokens of a row behind the skipped ones.
struct Keys {
    int64_t first;
    int count;
};

// ---------------------------------------------------------------- the call

template <typename T>
struct AttentionProblem {
    Offsets q_offsets, kv_offsets;  // `q_offsets` only where queries are packed
    QueryLayout layout;
    bool same_offsets;  // queries and keys have the same offsets
    int heads, kv_heads, q_per_kv;
    int queries;  // queries of each row, where they are not packed
    int channels, value_channels;
    int skip;  // keys left out at the start of each row
    Heads<const T> q, k, v;
    bool v_is_k;
    Rope rope;
    Variant<T> variant;
    Options options;
    const float* sinks = nullptr;  // by head
    float outer_scale;             // factor of sums over probabilities; dropout's is part of it
    float grad_scale;              // factor of sums over dS

    explicit AttentionProblem(const AttentionInputs& in, const RotatedInside& rotated = {});

    int64_t rows() const { return kv_offsets.rows; }
    // Whether scores are mapped one by one, in shared memory.
    __host__ __device__ bool maps_in_memory() const { return !variant.kind.softmax || options.in_memory(); }
    int64_t query_tokens() const { return layout == QueryLayout::packed ? q_offsets.tokens : rows() * queries; }
    // Mean numbers of a row.
    int64_t mean_packed_rows() const {
        if (layout != QueryLayout::packed) return int64_t{queries} * q_per_kv;
        return q_offsets.tokens * q_per_kv / (rows() > 0 ? rows() : 1);
    }
    int64_t mean_keys() const { return kv_offsets.tokens / (rows() > 0 ? rows() : 1); }
    // Slots of `count` rows (or row groups), in tiles of `block` packed rows.
    int64_t query_slots(int64_t count, int block) const {
        if (layout == QueryLayout::packed) return slots(q_offsets.tokens, count, q_per_kv, block);
        return count * tiles_of_row(block);
    }
    __host__ __device__ int64_t tiles_of_row(int block) const {
        return (int64_t{queries} * q_per_kv + block - 1) / block;
    }

    // Queries of a row by its two offsets.
    __device__ Queries queries_of(int64_t row) const {
        return layout == QueryLayout::packed ? packed_queries(q_offsets.span(row))
                                             : Queries{row, 0, row * queries, queries};
    }
    // Queries of the row that the search found for keys: the same span where both have the same offsets.
    __device__ Queries queries_beside(const Span& keys) const {
        return same_offsets ? packed_queries(keys) : queries_of(keys.row);
    }
    __device__ Queries packed_queries(const Span& row) const { return {row.row, row.first, row.first, row.count}; }

    // Keys of a row; the tail has none.
    __device__ Keys keys_of(const Span& row) const {
        if (row.row >= kv_offsets.rows) return {0, 0};
        return {row.first + skip, max(row.count - skip, 0)};
    }
    __device__ Keys keys_of(int64_t row) const { return keys_of(kv_offsets.span(row)); }
    // The masks of the row of these queries and keys.
    template <bool OPTIONS>
    __device__ auto masks_of(const Queries& of, const Keys& keys) const {
        if constexpr (OPTIONS) {
            const RowSizes sizes = options.masks.sizes(of.row, of.count, keys.count, of.row < kv_offsets.rows);
            return OptionRowMasks{options.masks, sizes, of.first, keys.first};
        } else {
            return RowMasks{variant.masks, of.count, keys.count};
        }
    }
    // Keys of the row that the search found for queries.
    __device__ Keys keys_beside(const Span& queries) const {
        return same_offsets ? keys_of(queries) : keys_of(queries.row);
    }
};

template <typename T>
AttentionProblem<T>::AttentionProblem(const AttentionInputs& in, const RotatedInside& rotated)
    : q_offsets(in.layout == QueryLayout::packed && in.q_offsets ? *in.q_offsets : in.kv_offsets, in.q.shape[0]),
      kv_offsets(in.kv_offsets, in.k.shape[0]),
      layout(in.layout),
      same_offsets(in.layout == QueryLayout::packed && !in.q_offsets),
      heads(static_cast<int>(in.q.shape[in.q.axes - 2])),
      kv_heads(static_cast<int>(in.k.shape[1])),
      q_per_kv(heads / kv_heads),
      queries(in.layout == QueryLayout::packed ? 0 : static_cast<int>(in.q.shape[in.q.axes - 3])),
      channels(static_cast<int>(in.k.shape[2])),
      value_channels(static_cast<int>((in.v ? *in.v : in.k).shape[2])),
      skip(clamped(in.skip_prefix)),
      q(in.q),
      k(in.k),
      v(in.v ? *in.v : in.k),
      v_is_k(!in.v),
      rope(in, rotated),
      variant(in.variant, Options(in).maps_scores()),
      options(in),
      sinks(in.variant_tensors.sinks ? static_cast<const float*>(in.variant_tensors.sinks->data) : nullptr),
      outer_scale(static_cast<float>(probs_factors<T>(in.variant).outer * options.dropout.factor)),
      grad_scale(static_cast<float>(d_scores_factors<T>(in.variant).outer)) {}

}  // namespace cuda
}  // namespace interformer
