// Forward of attention: scores = Q K', probs = P(scores), attn_out = probs V, then gate and residual.
#pragma once

#include "cpu/kernels/attention_row.h"
#include "cpu/kernels/few_queries_forward.h"

INTERFORMER_ISA_BEGIN

// A thread's memory. Strides are those of `Sizes`.
template <typename T>
struct ForwardWorkspace {
    using A = Acc<T>;
    using S = Stored<T>;
    using X = Operand<T>;

    S* keys;         // [max_keys, head_stride]
    S* values;       // [max_keys, value_stride]; the keys where v is k
    X* packed_keys;  // panels of the keys
    X* value_rows;   // [operands of max_keys, value_stride]; pairs only
    S* queries;      // [max_block, head_stride]
    A* scores;       // [block, score_stride]
    A* row_max;      // [max_block], and likewise row_sum
    A* row_sum;
    A* attn_out;  // [max_block, value_stride]
    A* scratch;   // the channels of one token
    int64_t bytes;

    ForwardWorkspace(const AttentionProblem& p, const Sizes<T>& sizes, void* memory) {
        const int64_t panels = round_up(p.max_keys, kPanel<X>), block = sizes.max_block(p);
        Arena arena(memory);
        keys = arena.allocate<S>(p.max_keys * sizes.head_stride);
        values = p.v_is_k ? keys : arena.allocate<S>(p.max_keys * sizes.value_stride);
        packed_keys = arena.allocate<X>(panels * operands<X>(sizes.head_stride));
        value_rows = kNumbers<X> == 1 ? nullptr : arena.allocate<X>(operands<X>(p.max_keys) * sizes.value_stride);
        queries = arena.allocate<S>(block * sizes.head_stride);
        scores = arena.allocate<A>(sizes.max_scores(p));
        row_max = arena.allocate<A>(round_up(block, kLanes<A>));
        row_sum = arena.allocate<A>(round_up(block, kLanes<A>));
        attn_out = arena.allocate<A>(block * sizes.value_stride);
        scratch = arena.allocate<A>(max(sizes.head_stride, sizes.value_stride));
        bytes = arena.bytes();
    }
};

template <typename T>
class AttentionForward {
  public:
    using A = Acc<T>;
    using S = Stored<T>;
    using X = Operand<T>;

    static int64_t memory(const AttentionProblem& p) {
        const AttentionForward forward(p, nullptr);
        return max(forward.work_.bytes, forward.few_queries_.bytes());
    }

    static void run(const AttentionProblem& p, const AttentionTask& task, void* memory) {
        const AttentionForward forward(p, memory);
        for_each_row(task, forward.few_queries_,
                     [&](int64_t row, int64_t kv_head) { forward.run_row(row, kv_head, task.shard); });
    }

  private:
    using Row = AttentionRow<T>;

    AttentionForward(const AttentionProblem& problem, void* memory)
        : p_(problem),
          sizes_(problem),
          work_(problem, sizes_, memory),
          epilogue_(problem, work_.scratch),
          few_queries_(problem, memory) {}

    // All queries of the row, or one shard of them.
    void run_row(int64_t batch_row, int64_t kv_head, int64_t shard) const {
        const Row row(p_, sizes_, batch_row, kv_head, work_.scratch);
        if (row.queries() == 0) return;
        const ColumnRanges ranges = row.shard_columns(shard);
        const Matrix<const S> keys = row.tokens(p_.k, ranges, p_.head_size, p_.rope.cos, work_.keys);
        const Matrix<const S> values = p_.v_is_k ? keys : row.tokens(p_.v, ranges, p_.value_size, false, work_.values);
        const PackedOperand<T> packed_keys(keys, row.keys(), ranges, sizes_.head_stride, work_.packed_keys);
        const Matrix<const X> value_rows = row.tokens_along_rows(values, ranges, sizes_.value_stride, work_.value_rows);
        const int64_t first = shard < 0 ? 0 : shard * row.shard();
        const int64_t last = min(shard < 0 ? row.queries() : first + row.shard(), row.queries());
        for (int64_t r = first; r < last; r += row.block())
            run_block(row, r, min(row.block(), row.queries() - r), packed_keys, value_rows);
    }

    void run_block(const Row& row, int64_t r, int64_t count, const PackedOperand<T>& keys,
                   Matrix<const X> values) const {
        const ColumnRanges ranges = row.variant().column_ranges(r, count);
        const Matrix<A> scores{work_.scores, row.score_stride()}, attn_out{work_.attn_out, sizes_.value_stride};
        keys.multiply(row.query_rows(r, count, work_.queries), count, ranges, scores);
        row.variant().scores_to_probs(r, count, scores, ranges, {work_.row_max, work_.row_sum, nullptr});
        for (int64_t i = 0; i < count; ++i)
            for (int range = 0; range < ranges.n; ++range) {
                A* probs = scores.from(i).data;
                pair_columns<X>(probs, ranges.r[range].begin, ranges.r[range].end, probs);
            }
        if (p_.lse.given) write_lse(row, r, count);
        weighted_sums<X>({operands_in<X>(scores.data), scores.stride, 1}, values, ranges, row.keys(), count,
                         sizes_.value_stride, attn_out);
        for (int64_t i = 0; i < count; ++i) {
            A* sums = attn_out.from(i).data;
            if (p_.variant.score.softmax) normalise<T>(sums, p_.value_size, A(1) / work_.row_sum[i]);
            epilogue_.finish(row.query(r + i), sums, p_.value_size);
        }
    }

    // Overwrites `row_max`.
    void write_lse(const Row& row, int64_t r, int64_t count) const {
        constexpr A kInfinity = __builtin_inf();
        const A scale = exp2_of<A>(row.variant().headroom());
        for (int64_t i = 0; i < count; i += kLanes<A>) {
            const Vector<A> row_max = load_vector(work_.row_max + i);
            const Vector<A> lse = row_max + logarithm(load_vector(work_.row_sum + i) * scale);
            store_vector(work_.row_max + i, row_max == kInfinity ? row_max : lse);
        }
        for (int64_t i = 0; i < count; ++i) *row.query(r + i).template at<A>(p_.lse) = work_.row_max[i];
    }

    const AttentionProblem& p_;
    const Sizes<T> sizes_;
    const ForwardWorkspace<T> work_;
    const Epilogue<T> epilogue_;
    const FewQueriesForward<T> few_queries_;  // in the same memory: a thread computes one row at a time
};

INTERFORMER_ISA_END
