// The attention variant on a GPU: how a product of a query with a key becomes a score and a probability, the derivative
// of both, and which keys a query sees. The forward, the statistics pass, dQ and dK/dV all take these from here.
//
// Masks come after the map of scores: a masked key has probability 0 and gradient 0 whatever the map of its score is.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common/attention_variant.h"
#include "common/element.h"
#include "cuda/acc_tile.cuh"
#include "cuda/maps.cuh"

namespace interformer {
namespace cuda {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// ---------------------------------------------------------------- masks

// Keys that a query sees: [from, to), and those before `prefix`.
struct KeyRange {
    int from, to, prefix;

    __device__ bool contains(int key) const { return (key >= from && key < to) || key < prefix; }
    __device__ bool fully_masked() const { return from >= to && prefix <= 0; }
};

// Tiles [0, before) and [start, stop).
struct TileRange {
    int before, start, stop;

    __device__ int count() const { return before + stop - start; }
    __device__ int operator[](int step) const { return step < before ? step : start + step - before; }
    __device__ bool contains(int tile) const { return tile < before || (tile >= start && tile < stop); }
    // The same without the tiles of [start, stop) that lie outside [from, to).
    __device__ TileRange within(int from, int to) const {
        const int first = max(start, from);
        return {before, first, max(min(stop, to), first)};
    }
};

inline int clamped(int64_t limit) {
    return static_cast<int>(limit < INT32_MAX ? limit : INT32_MAX);
}

struct Masks {
    int left, right, prefix;  // -1: open
    bool causal;

    explicit Masks(const AttentionVariant& variant)
        : left(clamped(variant.window_left)),
          right(clamped(variant.window_right)),
          prefix(clamped(variant.num_prefix)),
          causal(variant.causal) {}

    // Keys that query token `n` of a row sees. Tokens behind the row's queries see none.
    __device__ KeyRange key_range(int n, int queries, int keys) const {
        if (n >= queries) return {0, 0, 0};
        KeyRange range{0, keys, min(prefix, keys)};
        if (n < prefix) return range;
        const int diagonal = n + (keys - queries);
        if (causal) range.to = min(range.to, diagonal + 1);
        if (right >= 0 && diagonal + 1 <= keys - right) range.to = min(range.to, diagonal + 1 + right);
        if (left >= 0 && diagonal > left) range.from = diagonal - left;
        return range;
    }

    // Tiles of `tile` keys that some of the query tokens [first, last] see.
    __device__ TileRange key_tiles(int first, int last, int queries, int keys, int tile) const {
        const KeyRange begin = key_range(first, queries, keys), end = key_range(min(last, queries - 1), queries, keys);
        const int before = (begin.prefix + tile - 1) / tile, start = max(begin.from / tile, before);
        return {before, start, max((max(max(begin.to, end.to), 0) + tile - 1) / tile, start)};
    }

    // Tiles of `tile` packed rows of queries that see some of the keys [first, last].
    __device__ TileRange query_tiles(int first, int last, int queries, int keys, int q_per_kv, int tile) const {
        const int64_t shift = int64_t{keys} - queries, packed_rows = int64_t{queries} * q_per_kv;
        int64_t begin = 0, end = queries, before = 0;
        if (causal) begin = max(begin, first - shift);
        if (right >= 0) begin = max(begin, first - shift - right);
        if (left >= 0) end = min(end, last - shift + left + 1);
        if (prefix > 0) {
            before = (min(int64_t{prefix} * q_per_kv, packed_rows) + tile - 1) / tile;
            if (first < prefix) begin = 0, end = queries;
        }
        const int64_t start = max(begin * q_per_kv / tile, before);
        const int64_t stop = max((max(end, int64_t{0}) * q_per_kv + tile - 1) / tile, start);
        return {static_cast<int>(before), static_cast<int>(start), static_cast<int>(stop)};
    }
};

// ---------------------------------------------------------------- queries and keys of a tile of scores

// A query token of a row under one head.
struct PackedRow {
    int token, head;
};

// The packed rows of one row under one key/value head, from packed row `begin` on.
struct PackedRows {
    int token, head;  // token of the first packed row, and first query head of the key/value head
    int offset;       // heads of that token before the first packed row
    int q_per_kv;

    __device__ PackedRows(int64_t begin, int kv_head, int q_per_kv)
        : token(static_cast<int>(begin / q_per_kv)),
          head(kv_head * q_per_kv),
          offset(static_cast<int>(begin % q_per_kv)),
          q_per_kv(q_per_kv) {}
    __device__ int64_t begin() const { return int64_t{token} * q_per_kv + offset; }
    __device__ PackedRow operator[](int r) const {
        const int i = offset + r, tokens = q_per_kv == 1 ? i : i / q_per_kv;
        return {token + tokens, head + i - tokens * q_per_kv};
    }
};

// Data of a query on which the variant's scores depend. `Variant::query` makes it.
struct Query {
    KeyRange key_range;
};

// The same with data that the backward reads. Under softmax these are the log-sum-exp, delta, and the factor that makes
// exponentials probabilities.
struct alignas(16) QueryStats : Query {
    float lse, delta, inv_row_sum;
    int padding[2] = {};
};

// The query and the key of each score that a lane has of a tile whose rows are queries and whose columns are keys. A
// query is a `Query` in the forward, a `QueryStats` in the backward.
template <typename OneQuery>
struct ScoresByQuery {
    const OneQuery (&queries)[2];  // of the lane's two rows
    int first_key;                 // of the first column

    __device__ const OneQuery& query(int half, int) const { return queries[half]; }
    __device__ int key(int, int column) const { return first_key + column; }
};

// The queries of a lane's two rows, where a warp has 16 packed rows.
template <typename OneQuery>
struct LaneQueries {
    OneQuery queries[2];

    // `make(row)` is the query of a packed row.
    template <typename Make>
    __device__ LaneQueries(const PackedRows& rows, Make&& make) {
#pragma unroll
        for (int half = 0; half < 2; ++half) queries[half] = make(rows[lane_index() / 4 + half * 8]);
    }

    __device__ ScoresByQuery<OneQuery> scores(int first_key) const { return {queries, first_key}; }
};

// As `ScoresByQuery`, where rows are keys and columns are queries.
struct ScoresByKey {
    const QueryStats* queries;  // of all columns
    const int (&keys)[2];       // of the lane's two rows

    __device__ const QueryStats& query(int, int column) const { return queries[column]; }
    __device__ int key(int half, int) const { return keys[half]; }
};

// Whether the query of a score sees its key.
template <typename Places>
__device__ inline bool seen(const Places& at, int half, int column) {
    return at.query(half, column).key_range.contains(at.key(half, column));
}

// ---------------------------------------------------------------- one score

// The factor of a sum as two: `inner` multiplies the terms, `outer` the sum.
struct SumFactors {
    double inner, outer;
};

// All of the factor multiplies probabilities before they are summed up where it makes them smaller, so that no sum
// overflows whose scaled value is finite. float16 takes less of it, since small probabilities lose digits as operands.
template <typename T>
SumFactors probs_factors(const AttentionVariant& variant) {
    constexpr double min = std::is_same_v<T, Float16> ? 1.0 / 64 : 0.0;
    const double factor = variant.post_scale, size = std::abs(factor);
    const double inner = size > 1.0 ? 1.0 : size < min ? min : factor;
    return {inner, inner == factor ? 1.0 : factor / inner};
}

// The same for gradients of scores and their factor `scale`, of which float16 takes none.
template <typename T>
SumFactors d_scores_factors(const AttentionVariant& variant) {
    if (!std::is_same_v<T, Float16> && std::abs(variant.scale) <= 1.0) return {variant.scale, 1.0};
    return {1.0, variant.scale};
}

// The variant as kernels of elements `T` compute it.
template <typename T>
struct Variant {
    Score kind;
    Masks masks;
    float scale;
    float inner_scale;     // factor of pointwise probabilities
    float d_scores_scale;  // factor of dS

    explicit Variant(const AttentionVariant& variant)
        : kind(variant.score),
          masks(variant),
          scale(static_cast<float>(variant.scale)),
          inner_scale(static_cast<float>(probs_factors<T>(variant).inner)),
          d_scores_scale(static_cast<float>(d_scores_factors<T>(variant).inner)) {}

    // A query of a row of so many queries and keys.
    __device__ Query query(const PackedRow& row, int queries, int keys) const {
        return {masks.key_range(row.token, queries, keys)};
    }

    // The score of a product, rounded by itself in every pass: a compiler that fused the multiplication with what comes
    // after would give large scores other numbers in one pass than in the next.
    __device__ float score(float product) const { return __fmul_rn(product, scale); }

    // A pointwise score's probability, and the gradient of the score given that of the probability (times `scale`).
    __device__ float prob(float score) const { return activate(score, kind.activation); }
    __device__ float d_score(float score, float d_prob) const {
        // Where relu's derivative is 0, the gradient is, even if `d_prob` overflowed.
        if (kind.activation == Activation::relu && score <= 0.0f) return 0.0f;
        return d_prob * activation_grad(score, kind.activation);
    }
};

// ---------------------------------------------------------------- tiles of scores, forward

// Running maximum and sum of an online softmax, for the two rows of a lane. The sum is over this lane's columns alone,
// and relative to the maximum.
struct OnlineSoftmax {
    float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {};
};

// One more tile into an online softmax: products become probabilities relative to the new maximum, times `prob_scale`.
// Accumulators so far are to be multiplied by `alpha`. `at` has the places of the scores.
template <typename T, int N, typename Places>
__device__ inline void online_softmax_update(const Variant<T>& variant, AccTile (&s)[N], float prob_scale,
                                             OnlineSoftmax& softmax, float (&alpha)[2], const Places& at) {
    for_each(s, [&](int half, int column, float& x) { x = seen(at, half, column) ? variant.score(x) : -INFINITY; });
    float tile_max[2] = {-INFINITY, -INFINITY}, base[2];
    for_each(s, [&](int half, int, float& x) { tile_max[half] = fmaxf(tile_max[half], x); });
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float before = softmax.row_max[i], now = fmaxf(before, quad_max(tile_max[i]));
        base[i] = now == -INFINITY ? 0.0f : now;  // no key is seen yet: all probabilities are 0
        alpha[i] = exp2f((before - base[i]) * kLog2E);
        softmax.row_max[i] = now;
        softmax.row_sum[i] *= alpha[i];
    }
    for_each(s, [&](int half, int, float& x) {
        x = exp2f((x - base[half]) * kLog2E) * prob_scale;
        softmax.row_sum[half] += x;
    });
}

// Products become pointwise probabilities. `scratch` is this lane's column of shared memory.
template <typename T, int N, typename Places>
__device__ inline void scores_to_probs(const Variant<T>& variant, AccTile (&s)[N], float2* scratch, const Places& at) {
    for_each(s, [&](int, int, float& x) { x = variant.score(x); });
    AccTile unused[N];
    map_rolled(s, unused, scratch, [&](float& x, float&) { x = variant.inner_scale * variant.prob(x); });
    for_each(s, [&](int half, int column, float& x) { x = seen(at, half, column) ? x : 0.0f; });
}

// ---------------------------------------------------------------- tiles of scores, backward

// Products `s` become probabilities of a softmax, and gradients `d` of the probabilities become those of the scores,
// times `scale`.
template <typename T, int N, typename Places>
__device__ inline void softmax_backward(const Variant<T>& variant, AccTile (&s)[N], AccTile (&d)[N], float scale,
                                        const Places& at) {
    for_each_pair(s, d, [&](int half, int column, float& x, float& g) {
        const QueryStats& query = at.query(half, column);
        const float prob = exp2f((variant.score(x) - query.lse) * kLog2E) * query.inv_row_sum;
        const bool is_seen = seen(at, half, column);
        x = is_seen ? prob : 0.0f;
        g = is_seen ? prob * (g - query.delta) * scale : 0.0f;
    });
}

// The same for pointwise probabilities, without `inner_scale`.
template <typename T, int N, typename Places>
__device__ inline void pointwise_backward(const Variant<T>& variant, AccTile (&s)[N], AccTile (&d)[N], float2* scratch,
                                          const Places& at) {
    for_each_pair(s, d, [&](int, int, float& x, float& g) {
        x = variant.score(x);
        g = g * variant.d_scores_scale;
    });
    map_rolled(s, d, scratch, [&](float& x, float& g) {
        g = variant.d_score(x, g);
        x = variant.prob(x);
    });
    for_each_pair(s, d, [&](int half, int column, float& x, float& g) {
        const bool is_seen = seen(at, half, column);
        x = is_seen ? x : 0.0f;
        g = is_seen ? g : 0.0f;
    });
}

// Products and gradients of probabilities become probabilities and gradients of scores, times `d_scores_scale`.
template <typename T, int N, typename Places>
__device__ inline void scores_backward(const Variant<T>& variant, AccTile (&s)[N], AccTile (&d)[N], float2* scratch,
                                       const Places& at) {
    if (variant.kind.softmax)
        softmax_backward(variant, s, d, variant.d_scores_scale, at);
    else
        pointwise_backward(variant, s, d, scratch, at);
}

}  // namespace cuda
}  // namespace interformer
