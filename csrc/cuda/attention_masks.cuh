// Masks of attention: which keys a query sees, which tiles hold some of them, and which hold nothing else; and the
// query and the key of each score that a lane has.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/attention_variant.h"
#include "cuda/acc_tile.cuh"

namespace interformer {
namespace cuda {

// ---------------------------------------------------------------- masks

// Keys that a query sees: [from, to), and those before `prefix`.
struct KeyRange {
    int from, to, prefix;

    // Without branches: one comparison each, and no jump for every score.
    __device__ bool contains(int key) const { return ((key >= from) & (key < to)) | (key < prefix); }
    __device__ bool contains(int first, int count) const {
        return ((first >= from) & (first + count <= to)) | (first + count <= prefix);
    }
    __device__ bool fully_masked() const { return from >= to && prefix <= 0; }
};

// Tiles [0, before) and [start, stop).
struct TileRange {
    int before, start, stop;

    __device__ int count() const { return before + stop - start; }
    __device__ int operator[](int step) const { return step < before ? step : start + step - before; }
    // Without branches, as `KeyRange::contains`.
    __device__ bool contains(int tile) const { return (tile < before) | ((tile >= start) & (tile < stop)); }
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

    // Keys that all of the query tokens [first, last] see, those behind the row's queries left aside. Ranges move on
    // with the query, from the first one behind the prefix on.
    __device__ KeyRange common_range(int first, int last, int queries, int keys) const {
        last = min(last, queries - 1);
        const KeyRange begin = key_range(max(first, min(prefix, last)), queries, keys);
        const KeyRange end = key_range(last, queries, keys);
        return {end.from, begin.to, end.prefix};
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

    // Tiles of `tile` packed rows that see all of the keys [first, last]. Rows behind the row's queries count as well:
    // their queries and gradients are zeros, and add nothing.
    __device__ TileRange common_query_tiles(int first, int last, int queries, int keys, int q_per_kv, int tile) const {
        if (first < 0 || last >= keys) return {0, 0, 0};
        const int64_t shift = int64_t{keys} - queries;
        int64_t begin = 0, end = queries;
        if (last >= prefix) {
            if (causal) begin = max(begin, last - shift);
            if (right >= 0) begin = max(begin, last - shift - right);
            if (left >= 0) end = min(end, first - shift + left + 1);
        }
        const int64_t before = max(int64_t{min(prefix, queries)}, int64_t{0}) * q_per_kv / tile;
        const int64_t start = (begin * q_per_kv + tile - 1) / tile;
        const int64_t stop = end >= queries ? INT32_MAX : max(end, int64_t{0}) * q_per_kv / tile;
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

// Data of a query on which the masks depend: the keys that it sees, a `KeyRange` or a `KeySet`.
template <typename Range>
struct Query {
    Range key_range;
};

// The same with data that the backward reads. Under softmax these are the log-sum-exp, delta, and the factor that makes
// exponentials probabilities.
template <typename Range>
struct QueryStats : Query<Range> {
    float lse, delta, inv_row_sum;
};

// The statistics of COUNT queries in shared memory, where neighbours in a lane are read together.
template <int COUNT, typename Range>
struct alignas(16) StreamedStats {
    float lse[COUNT], delta[COUNT], inv_row_sum[COUNT];
    Range key_range[COUNT];

    __device__ void set(int i, const QueryStats<Range>& query) {
        lse[i] = query.lse;
        delta[i] = query.delta;
        inv_row_sum[i] = query.inv_row_sum;
        key_range[i] = query.key_range;
    }
};

// The query and the key of each score that a lane has of a tile whose rows are queries and whose columns are keys. A
// query is a `Query` in the forward, a `QueryStats` in the backward.
template <typename OneQuery>
struct ScoresByQuery {
    const OneQuery (&queries)[2];  // of the lane's two rows
    int first_key;                 // of the first column
    bool all_seen;                 // no score is masked

    __device__ const OneQuery& query(int half, int) const { return queries[half]; }
    __device__ const auto& key_range(int half, int) const { return queries[half].key_range; }
    __device__ int key(int, int column) const { return first_key + column; }
};

// The queries of a lane's two rows, where a warp has 16 packed rows, and the keys that all 16 see.
template <typename OneQuery>
struct LaneQueries {
    using Range = decltype(OneQuery::key_range);

    OneQuery queries[2];
    Range common;

    // `make(row)` is the query of a packed row.
    template <typename Make>
    __device__ LaneQueries(const PackedRows& rows, const Range& common, Make&& make) : common(common) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            queries[half] = make(rows[lane_index() / 4 + half * 8]);
            // A full prefix is that of all queries: one register instead of three.
            if constexpr (std::is_same_v<Range, KeyRange>) queries[half].key_range.prefix = common.prefix;
        }
    }

    // The scores of `count` keys from `first_key` on.
    __device__ ScoresByQuery<OneQuery> scores(int first_key, int count) const {
        return {queries, first_key, common.contains(first_key, count)};
    }
};

// As `ScoresByQuery`, where rows are keys and columns are queries, from number `first` on.
template <int COUNT, typename Range>
struct ScoresByKey {
    const StreamedStats<COUNT, Range>& queries;
    int first;
    const int (&keys)[2];  // of the lane's two rows
    bool all_seen;

    __device__ QueryStats<Range> query(int half, int column) const {
        return {{key_range(half, column)},
                at(queries.lse, column),
                at(queries.delta, column),
                at(queries.inv_row_sum, column)};
    }
    __device__ const Range& key_range(int, int column) const { return queries.key_range[first + column]; }
    __device__ int key(int half, int) const { return keys[half]; }

  private:
    // The two neighbouring columns of a lane are read at once.
    __device__ float at(const float (&numbers)[COUNT], int column) const {
        const float2 pair = reinterpret_cast<const float2*>(numbers + first)[column / 2];
        return column % 2 == 0 ? pair.x : pair.y;
    }
};

// Sets the numbers at masked scores of a tile. Inner tiles have none: there this costs a branch.
template <int N, typename Places>
__device__ inline void mask_out(AccTile (&acc)[N], const Places& at, float masked) {
    if (at.all_seen) return;
    for_each(acc, [&](int half, int column, float& x) {
        x = at.key_range(half, column).contains(at.key(half, column)) ? x : masked;
    });
}

}  // namespace cuda
}  // namespace interformer
