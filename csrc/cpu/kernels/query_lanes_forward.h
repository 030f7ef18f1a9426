// Forward of attention for rows of many queries, a tile of queries in lanes at a time (query_lanes.h): scores = K Q',
// probs = P(scores), attn_out = probs' V, then gate and residual.
#pragma once

#include "cpu/kernels/attention_row.h"
#include "cpu/kernels/query_lanes.h"
#include "cpu/kernels/score_lanes.h"

INTERFORMER_ISA_BEGIN

// A thread's memory. Strides are those of `Sizes`.
template <typename T>
struct QueryLanesWorkspace {
    using A = Acc<T>;
    using S = Stored<T>;
    using X = Operand<T>;
    static constexpr int64_t kQueries = kPanel<A>;  // of a tile
    static constexpr int64_t kKeys = 128;           // of a block

    S* keys;         // [max_keys, head_stride]
    S* values;       // [max_keys, value_stride]; the keys where v is k
    X* value_rows;   // [operands of max_keys, value_stride]; pairs only
    S* query_rows;   // [kQueries, head_stride]
    X* queries;      // [operands of head_stride, kQueries], transposed
    A* scores;       // [kKeys, kQueries]
    A* inv_row_sum;  // [kQueries], and likewise lse
    A* lse;
    A* attn_out;  // [kQueries, value_stride]
    A* scratch;   // the channels of one token
    int64_t bytes;

    QueryLanesWorkspace(const AttentionProblem& p, const Sizes<T>& sizes, void* memory) {
        Arena arena(memory);
        keys = arena.allocate<S>(p.max_keys * sizes.head_stride);
        values = p.v_is_k ? keys : arena.allocate<S>(p.max_keys * sizes.value_stride);
        value_rows = kNumbers<X> == 1 ? nullptr : arena.allocate<X>(operands<X>(p.max_keys) * sizes.value_stride);
        query_rows = arena.allocate<S>(kQueries * sizes.head_stride);
        queries = arena.allocate<X>(operands<X>(sizes.head_stride) * kQueries);
        scores = arena.allocate<A>(kKeys * kQueries);
        inv_row_sum = arena.allocate<A>(kQueries);
        lse = arena.allocate<A>(kQueries);
        attn_out = arena.allocate<A>(kQueries * sizes.value_stride);
        scratch = arena.allocate<A>(max(sizes.head_stride, sizes.value_stride));
        bytes = arena.bytes();
    }
};

template <typename T>
class QueryLanesForward {
  public:
    using A = Acc<T>;
    using S = Stored<T>;
    using X = Operand<T>;

    QueryLanesForward(const AttentionProblem& problem, void* memory)
        : p_(problem), sizes_(problem), work_(problem, sizes_, memory), epilogue_(problem, work_.scratch) {}

    int64_t bytes() const { return work_.bytes; }

    // All queries of the row, or one shard of them. Tiles begin anew with each shard.
    void run_row(int64_t batch_row, int64_t kv_head, int64_t shard) const {
        const Row row(p_, sizes_, batch_row, kv_head, work_.scratch);
        if (row.queries() == 0) return;
        const ColumnRanges ranges = row.shard_columns(shard);
        const Operands operands = read(row, ranges);
        const int64_t first = shard < 0 ? 0 : shard * row.shard();
        const int64_t last = min(shard < 0 ? row.queries() : first + row.shard(), row.queries());
        for (int64_t r = first; r < last; r += row.shard()) run_shard(row, r, min(row.shard(), last - r), operands);
    }

  private:
    using Row = AttentionRow<T>;
    using Workspace = QueryLanesWorkspace<T>;

    struct Operands {
        KeyScalars<X> keys;
        Matrix<const X> values;
    };

    // Keys are read in place but where they are widened or rotated, or pairs would not begin where an operand may.
    Operands read(const Row& row, const ColumnRanges& ranges) const {
        const Matrix<const S> keys = row.tokens(p_.k, ranges, p_.head_size, p_.rope.cos, work_.keys);
        const Matrix<const S> values = p_.v_is_k ? keys : row.tokens(p_.v, ranges, p_.value_size, false, work_.values);
        return {{reinterpret_cast<const X*>(keys.data), keys.stride / kNumbers<X>},
                row.tokens_along_rows(values, ranges, sizes_.value_stride, work_.value_rows)};
    }

    void run_shard(const Row& row, int64_t first, int64_t count, const Operands& operands) const {
        int64_t r = first;
        for (const int64_t last = first + count; r < last; r += kPanel<A>)
            if (last - r > kLanes<A>)
                run_tile<2>(row, r, min(kPanel<A>, last - r), operands);
            else
                run_tile<1>(row, r, last - r, operands);
    }

    template <int N>
    void run_tile(const Row& row, int64_t r, int64_t count, const Operands& operands) const {
        constexpr int64_t kQueries = N * kLanes<A>;
        const Matrix<A> attn_out{work_.attn_out, sizes_.value_stride};
        const int64_t depth = operands_of(p_.head_size);
        load_queries<N>(row, r, count);
        ScoreLanes<T, N> lanes(row.variant(), r, count);
        const ColumnRanges ranges = lanes.columns();
        bool add = false;
        for (int i = 0; i < ranges.n; ++i)
            for (int64_t j = ranges.r[i].begin, end = min(ranges.r[i].end, row.keys()); j < end;
                 j += Workspace::kKeys) {
                const int64_t keys = min(Workspace::kKeys, end - j);
                lane_scores<X, N>(operands.keys.from(j, 0), work_.queries, keys, depth, work_.scores);
                if (lanes.scores_to_probs(j, keys, work_.scores) && add) rescale(lanes.rescale(), count);
                lane_sums<X, N>(operands_in<X>(work_.scores), operands.values.from(j / kNumbers<X>), count,
                                sizes_.value_stride, operands_of(keys), attn_out, add);
                add = true;
            }
        static_assert(Workspace::kKeys % kNumbers<X> == 0 && kQueries <= Workspace::kQueries);
        if (!add) fill(work_.attn_out, count * sizes_.value_stride, A(0));
        lanes.inv_row_sums(work_.inv_row_sum);
        if (p_.lse.given) {
            lanes.lse(work_.lse);
            for (int64_t i = 0; i < count; ++i) *row.query(r + i).template at<A>(p_.lse) = work_.lse[i];
        }
        for (int64_t i = 0; i < count; ++i) {
            A* sums = attn_out.from(i).data;
            if (p_.variant.score.softmax) normalise<T>(sums, p_.value_size, work_.inv_row_sum[i]);
            epilogue_.finish(row.query(r + i), sums, p_.value_size);
        }
    }

    static int64_t operands_of(int64_t count) { return operands<X>(count); }

    template <int N>
    void load_queries(const Row& row, int64_t r, int64_t count) const {
        constexpr int64_t W = kLanes<A>;
        const Matrix<const S> rows = row.query_rows(r, count, work_.query_rows);
        for (int n = 0; n < N; ++n) {
            const X* lanes[W];
            for (int64_t i = 0; i < W; ++i)
                lanes[i] = reinterpret_cast<const X*>(rows.from(min(n * W + i, count - 1)).data);
            transpose_queries<X>(lanes, operands_of(sizes_.head_stride), work_.queries + n * W, N * W);
        }
    }

    void rescale(const A* factors, int64_t count) const {
        for (int64_t i = 0; i < count; ++i) {
            A* sums = work_.attn_out + i * sizes_.value_stride;
            for (int64_t c = 0; c < sizes_.value_stride; c += kLanes<A>)
                store_vector(sums + c, load_vector(sums + c) * factors[i]);
        }
    }

    const AttentionProblem& p_;
    const Sizes<T> sizes_;
    const QueryLanesWorkspace<T> work_;
    const Epilogue<T> epilogue_;
};

INTERFORMER_ISA_END
