// Forward of attention: scores = Q K', probs = P(scores), attn_out = probs V, then gate and residual.
#pragma once

#include "cpu/kernels/attention_row.h"

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

    static int64_t memory(const AttentionProblem& p) { return AttentionForward(p, nullptr).work_.bytes; }

    static void run(const AttentionProblem& p, const AttentionTask& task, void* memory) {
        const AttentionForward forward(p, memory);
        for_each_row(task, [&](int64_t row, int64_t kv_head) { forward.run_row(row, kv_head, task.shard); });
    }

  private:
    using Row = AttentionRow<T>;

    AttentionForward(const AttentionProblem& problem, void* memory)
        : p_(problem), sizes_(problem), work_(problem, sizes_, memory) {}

    // All queries of the row, or one shard of them.
    void run_row(int64_t batch_row, int64_t kv_head, int64_t shard) const {
        const Row row(p_, sizes_, batch_row, kv_head, work_.scratch);
        if (row.queries() == 0) return;
        const ColumnRanges ranges = row.shard_columns(shard);
        const Matrix<const S> keys = row.tokens(p_.k, ranges, p_.head_size, p_.rope.cos, work_.keys);
        const Matrix<const S> values = p_.v_is_k ? keys : row.tokens(p_.v, ranges, p_.value_size, false, work_.values);
        const PackedOperand<T> packed_keys(keys, row.keys(), ranges, sizes_.head_stride, row.queries(),
                                           work_.packed_keys);
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
            if (p_.variant.score.softmax) normalise(attn_out.from(i).data, A(1) / work_.row_sum[i]);
            finish(row, r + i, attn_out.from(i).data);
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
        for (int64_t i = 0; i < count; ++i) *row.template at<A>(p_.lse, r + i) = work_.row_max[i];
    }

    // Divides the weighted sums of values. The mean of finite values is finite, but its rounding may overflow; the sum,
    // about half as large, then is finite and tells this case from values that are infinite.
    void normalise(A* attn_out, A inv_row_sum) const {
        constexpr A kLargest = largest_number<T>;
        for (int64_t c = 0; c < p_.value_size; ++c) {
            const A sum = attn_out[c], mean = sum * inv_row_sum;
            const A below = mean > kLargest && sum <= kLargest ? kLargest : mean;
            attn_out[c] = below < -kLargest && sum >= -kLargest ? -kLargest : below;
        }
    }

    // Gate, residual and output of one query.
    void finish(const Row& row, int64_t r, A* attn_out) const {
        const int64_t channels = p_.value_size;
        if (p_.attn_out.given) narrow(attn_out, channels, row.template at<A>(p_.attn_out, r));
        if (p_.gate.given) {
            widen(row.at(p_.gate, r), p_.gate.channel, channels, work_.scratch);
            apply_gate(p_.gating, attn_out, work_.scratch, channels);
        }
        if (p_.residual.given) {
            widen(row.at(p_.residual, r), p_.residual.channel, channels, work_.scratch);
            for (int64_t c = 0; c < channels; ++c) attn_out[c] += work_.scratch[c];
        }
        narrow(attn_out, channels, row.at(p_.out, r));
    }

    const AttentionProblem& p_;
    const Sizes<T> sizes_;
    const ForwardWorkspace<T> work_;
};

INTERFORMER_ISA_END
