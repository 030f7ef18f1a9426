// Forward of the attention kernels: scores = Q K', weights, A = weights V, then gate and residual.
#pragma once

#include "cpu/kernels/attention_row.h"

INTERFORMER_LEVEL_BEGIN

template <typename T>
class AttentionForward {
  public:
    using A = Acc<T>;
    using S = Stored<T>;
    using X = Operand<T>;

    static int64_t memory(const AttentionProblem& p) { return AttentionForward(p, nullptr).bytes_; }

    static void run(const AttentionProblem& p, const AttentionTask& task, void* memory) {
        AttentionForward forward(p, memory);
        for_each_row(task, [&](int64_t row, int64_t kv_head) { forward.whole_row(row, kv_head, task.part); });
    }

  private:
    AttentionForward(const AttentionProblem& problem, void* memory) : p(problem), size_(problem) {
        const int64_t panels = round_up(p.most_keys, kPanel<X>), block = size_.most_block(p);
        Memory from(memory);
        keys_ = from.take<S>(p.most_keys * size_.head_stride);
        values_ = p.v_is_k ? keys_ : from.take<S>(p.most_keys * size_.value_stride);
        packed_keys_ = from.take<X>(panels * operands<X>(size_.head_stride));
        value_rows_ = kNumbers<X> == 1 ? nullptr : from.take<X>(operands<X>(p.most_keys) * size_.value_stride);
        queries_ = from.take<S>(block * size_.head_stride);
        scores_ = from.take<A>(size_.most_scores(p));
        largest_ = from.take<A>(round_up(block, kLanes<A>));
        sums_ = from.take<A>(round_up(block, kLanes<A>));
        attn_out_ = from.take<A>(block * size_.value_stride);
        extra_ = from.take<A>(most(size_.head_stride, size_.value_stride));
        bytes_ = from.bytes();
    }

    // `part`: of the row's queries, or -1.
    void whole_row(int64_t batch_row, int64_t kv_head, int64_t part) const {
        const AttentionRow<T> row(p, size_, batch_row, kv_head, extra_);
        if (row.total == 0) return;
        const ColumnRuns seen = part < 0 ? row.all_columns() : row.columns_of_part(part);
        const Matrix<const S> keys = row.tokens(p.k, seen, p.head_size, p.rope.cos, keys_);
        const Matrix<const S> values = p.v_is_k ? keys : row.tokens(p.v, seen, p.value_size, false, values_);
        const Multiplicand<T> factors(keys, row.keys, seen, size_.head_stride, row.total, packed_keys_);
        const Matrix<const X> value_rows =
            row.tokens_along_rows(values, row.keys, seen, size_.value_stride, value_rows_);
        const int64_t first = part < 0 ? 0 : part * row.part, last = part < 0 ? row.total : first + row.part;
        for (int64_t r = first; r < least(last, row.total); r += row.block)
            one_block(row, r, least(row.block, row.total - r), factors, value_rows);
    }

    void one_block(const AttentionRow<T>& row, int64_t r, int64_t count, const Multiplicand<T>& keys,
                   Matrix<const X> values) const {
        Columns runs[2];
        const int parts = row.columns(r, count, runs);
        const Matrix<A> scores{scores_, row.score_stride}, attn_out{attn_out_, size_.value_stride};
        const Matrix<const S> queries = row.queries(r, count, queries_);
        for (int i = 0; i < parts; ++i) keys.multiply(queries, count, runs[i], scores);
        row.weigh(r, count, scores, runs, parts, {largest_, sums_, nullptr});
        for (int64_t i = 0; i < count; ++i)
            for (int part = 0; part < parts; ++part) {
                A* s = scores.from(i).data;
                pair_columns<X>(s, runs[part].begin, runs[part].end, s);
            }
        if (p.lse.given) write_log_sums(row, r, count);
        weighted_sums<X>({operands_in<X>(scores.data), scores.stride, 1}, values, runs, parts, row.keys, count,
                         size_.value_stride, attn_out);
        for (int64_t i = 0; i < count; ++i) {
            if (p.score.softmax) divide(attn_out.from(i).data, A(1) / sums_[i]);
            finish(row, r + i, attn_out.from(i).data);
        }
    }

    void write_log_sums(const AttentionRow<T>& row, int64_t r, int64_t count) const {
        constexpr A kInfinity = __builtin_inf();
        const A whole = two_to<A>(row.headroom());
        for (int64_t i = 0; i < count; i += kLanes<A>) {
            const Vector<A> largest = load_vector(largest_ + i);
            const Vector<A> log_sum = largest + logarithm(load_vector(sums_ + i) * whole);
            store_vector(largest_ + i, largest == kInfinity ? largest : log_sum);
        }
        for (int64_t i = 0; i < count; ++i) *row.template at<A>(p.lse, r + i) = largest_[i];
    }

    // Sums of values become their means. A mean of finite values is none of the values larger, and its rounding may not
    // make it so; half that is still finite shows that the values were.
    void divide(A* a, A share) const {
        constexpr A kLargest = largest_number<T>;
        for (int64_t c = 0; c < p.value_size; ++c) {
            const A sum = a[c], mean = sum * share, below = mean > kLargest && sum <= kLargest ? kLargest : mean;
            a[c] = below < -kLargest && sum >= -kLargest ? -kLargest : below;
        }
    }

    // Gate, residual and output of one query.
    void finish(const AttentionRow<T>& row, int64_t r, A* a) const {
        const int64_t channels = p.value_size;
        if (p.attn_out.given) narrow(a, channels, row.template at<A>(p.attn_out, r));
        if (p.gate.given) {
            widen(row.at(p.gate, r), p.gate.channel, channels, extra_);
            apply_gate(p.gating, a, extra_, channels);
        }
        if (p.residual.given) {
            widen(row.at(p.residual, r), p.residual.channel, channels, extra_);
            for (int64_t c = 0; c < channels; ++c) a[c] += extra_[c];
        }
        narrow(a, channels, row.at(p.out, r));
    }

    const AttentionProblem& p;
    Sizes<T> size_;
    int64_t bytes_;
    S *keys_, *values_, *queries_;
    X *packed_keys_, *value_rows_;
    A *scores_, *largest_, *sums_, *attn_out_, *extra_;
};

INTERFORMER_LEVEL_END
