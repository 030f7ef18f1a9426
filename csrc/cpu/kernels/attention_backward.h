// Backward of the attention kernels, in one pass over the queries: scores and weights P again, dP = dA V', then
//
//     dS = P * (dP - sum over keys of P * dP)      (softmax; else act'(S) * dP)
//     dQ = scale dS K,   dK += scale dS' Q,   dV += P' dA
//
// where without softmax P is act(S), and dA holds `post_scale`.
#pragma once

#include "cpu/kernels/attention_row.h"

INTERFORMER_LEVEL_BEGIN

template <typename T>
class AttentionBackward {
  public:
    using A = Acc<T>;
    using S = Stored<T>;
    using X = Operand<T>;

    static int64_t memory(const AttentionProblem& p) { return AttentionBackward(p, 0, nullptr).bytes_; }

    static void run(const AttentionProblem& p, const AttentionTask& task, void* memory) {
        const AttentionBackward backward(p, task.run, memory);
        for_each_row(task, [&](int64_t row, int64_t kv_head) { backward.whole_row(row, kv_head, task); });
    }

    static int64_t parts(const AttentionProblem& p, int64_t row) {
        const Sizes<T> size(p);
        return Row(p, size, row, 0, nullptr).parts();
    }
    static int64_t sums_bytes(const AttentionProblem& p, int64_t row) {
        const Sizes<T> size(p);
        return p.key_counts[row] * (size.head_stride + size.value_stride) * static_cast<int64_t>(sizeof(A));
    }
    static void add_part(const AttentionProblem& p, const AttentionTask& task, void* memory) {
        const AttentionBackward backward(p, task.run, memory);
        const Row row(p, backward.size_, task.first_row, task.first_head, nullptr);
        const KeyGradients to = backward.part_sums(row, task.row_sums);
        if (task.part > 0)
            backward.add(row, row.columns_of_part(task.part), backward.part_sums(row, backward.part_sums_), to);
        if (task.part + 1 == row.parts()) backward.write(row, to);
    }

  private:
    using Row = AttentionRow<T>;

    AttentionBackward(const AttentionProblem& problem, int64_t run, void* memory)
        : p(problem), size_(problem), run_(run) {
        const int64_t panels = round_up(p.most_keys, kPanel<X>), block = size_.most_block(p);
        const int64_t scores = size_.most_scores(p), channels = most(size_.head_stride, size_.value_stride);
        Memory from(memory);
        keys_ = from.take<S>(p.most_keys * size_.head_stride);
        values_ = p.v_is_k ? keys_ : from.take<S>(p.most_keys * size_.value_stride);
        packed_keys_ = from.take<X>(panels * operands<X>(size_.head_stride));
        packed_values_ = p.v_is_k ? packed_keys_ : from.take<X>(panels * operands<X>(size_.value_stride));
        queries_ = from.take<S>(block * size_.head_stride);
        grad_a_ = from.take<S>(block * size_.value_stride);
        scores_ = from.take<A>(scores);
        slopes_ = from.take<A>(scores);
        largest_ = from.take<A>(round_up(block, kLanes<A>));
        sums_ = from.take<A>(round_up(block, kLanes<A>));
        means_ = from.take<A>(round_up(block, kLanes<A>));
        grad_q_ = from.take<A>(block * size_.head_stride);
        grad_k_ = from.take<A>(p.most_keys * size_.head_stride);
        grad_v_ = p.v_is_k ? grad_k_ : from.take<A>(p.most_keys * size_.value_stride);
        extra_ = from.take<A>(channels);
        attn_out_ = from.take<A>(channels);
        gate_ = from.take<A>(channels);
        if (kNumbers<X> > 1) {
            key_rows_ = from.take<X>(operands<X>(p.most_keys) * size_.head_stride);
            query_rows_ = from.take<X>(operands<X>(block) * size_.head_stride);
            grad_a_rows_ = from.take<X>(operands<X>(block) * size_.value_stride);
            slope_columns_ = from.take<A>(scores);
        }
        if (size_.has_parts(p)) part_sums_ = from.take<A>(p.most_keys * (size_.head_stride + size_.value_stride));
        bytes_ = from.bytes();
    }

    void whole_row(int64_t batch_row, int64_t kv_head, const AttentionTask& task) const {
        const Row row(p, size_, batch_row, kv_head, extra_);
        const ColumnRuns seen = task.part < 0 ? row.all_columns() : row.columns_of_part(task.part);
        const Matrix<const S> keys = row.tokens(p.k, seen, p.head_size, p.rope.cos, keys_);
        const Matrix<const S> values = p.v_is_k ? keys : row.tokens(p.v, seen, p.value_size, false, values_);
        const Multiplicand<T> factors(keys, row.keys, seen, size_.head_stride, row.total, packed_keys_);
        const Factors of_row{
            factors,
            p.v_is_k ? factors : Multiplicand<T>(values, row.keys, seen, size_.value_stride, row.total, packed_values_),
            row.tokens_along_rows(keys, row.keys, seen, size_.head_stride, key_rows_)};
        if (task.part > 0) {
            later_part(row, task.part, of_row);
            return;
        }
        const KeyGradients to = task.part < 0 ? whole_sums(row) : part_sums(row, task.row_sums);
        one_part(row, 0, of_row, row.all_columns(), to);
        if (task.part == 0) return;
        for (int64_t part = 1; part < row.parts(); ++part)
            add(row, row.columns_of_part(part), later_part(row, part, of_row), to);
        write(row, to);
    }

    // What a row's queries are multiplied with.
    struct Factors {
        Multiplicand<T> keys, values;
        Matrix<const X> key_rows;
    };
    // Sums of the gradients of a row's keys and values; both are one where values are keys.
    struct KeyGradients {
        Matrix<A> keys, values;
    };

    KeyGradients part_sums(const Row& row, void* memory) const {
        A* sums = static_cast<A*>(memory);
        const Matrix<A> keys{sums, size_.head_stride};
        return {keys, p.v_is_k ? keys : Matrix<A>{sums + row.keys * size_.head_stride, size_.value_stride}};
    }
    KeyGradients whole_sums(const Row& row) const {
        const Matrix<A> keys = sums_in(row, p.grad_k, p.head_size, p.rope.cos, grad_k_);
        return {keys, p.v_is_k ? keys : sums_in(row, p.grad_v, p.value_size, false, grad_v_)};
    }
    // In place where one block of queries makes all of them, else in memory that is dense, and that later blocks find
    // in the cache.
    static Matrix<A> sums_in(const Row& row, const RowTensor& grad, int64_t channels, bool rotated, A* memory) {
        if constexpr (std::is_same_v<T, A>)
            if (row.total <= row.block && !rotated && channels % kLanes<A> == 0)
                return {row.key_at(grad, 0), grad.token};
        return {memory, padded<X>(channels)};
    }

    void add(const Row& row, const ColumnRuns& columns, const KeyGradients& share, const KeyGradients& to) const {
        for (int i = 0; i < columns.count; ++i) {
            const int64_t begin = columns.runs[i].begin, count = least(columns.runs[i].end, row.keys) - begin;
            add(share.keys.from(begin).data, count * size_.head_stride, to.keys.from(begin).data);
            if (!p.v_is_k) add(share.values.from(begin).data, count * size_.value_stride, to.values.from(begin).data);
        }
    }
    static void add(const A* share, int64_t count, A* to) {
        for (int64_t i = 0; i < count; ++i) to[i] += share[i];
    }

    void write(const Row& row, const KeyGradients& sums) const {
        write(row, sums.keys, p.grad_k, p.head_size, p.rope.cos);
        if (!p.v_is_k) write(row, sums.values, p.grad_v, p.value_size, false);
    }
    void write(const Row& row, Matrix<A> sums, const RowTensor& grad, int64_t channels, bool rotated) const {
        if (static_cast<void*>(sums.data) == row.key_at(grad, 0)) return;
        for (int64_t j = 0; j < row.keys; ++j) {
            A* sum = sums.from(j).data;
            if (rotated) turn(p.rope, row.key_position(j), A(-1), sum);
            narrow(sum, channels, row.key_at(grad, j));
        }
    }

    // The queries of one part, or none; the gradients of the columns' keys under them are written to `to`.
    void one_part(const Row& row, int64_t part, const Factors& of_row, const ColumnRuns& columns,
                  const KeyGradients& to) const {
        const int64_t first = part * row.part, last = least(first + row.part, row.total);
        if (first >= last) no_key_gradients(row, columns, to);
        for (int64_t r = first; r < last; r += row.block)
            one_block(row, r, least(row.block, last - r), r == first ? &columns : nullptr, of_row, to);
    }
    // A part that is not the first: the keys that it sees, and no other ones, have gradients in memory of its own, so
    // that a row of many parts costs what its queries see.
    KeyGradients later_part(const Row& row, int64_t part, const Factors& of_row) const {
        const KeyGradients share = part_sums(row, part_sums_);
        one_part(row, part, of_row, row.columns_of_part(part), share);
        return share;
    }

    // `begins`: the columns of a part that begins with this block.
    void one_block(const Row& row, int64_t r, int64_t count, const ColumnRuns* begins, const Factors& of_row,
                   const KeyGradients& to) const {
        Columns runs[2];
        const int parts = row.columns(r, count, runs);
        const Matrix<A> weights{scores_, row.score_stride}, slopes{slopes_, row.score_stride};
        const Matrix<const S> queries = row.queries(r, count, queries_), grad_a{grad_a_, size_.value_stride};
        for (int64_t i = 0; i < count; ++i) back_through_epilogue(row, r + i, grad_a_ + i * grad_a.stride);
        for (int i = 0; i < parts; ++i) {
            of_row.keys.multiply(queries, count, runs[i], weights);
            of_row.values.multiply(grad_a, count, runs[i], slopes);
        }
        score_gradients(row, r, count, weights, slopes, runs, parts);
        const Scalars<X> slope_columns = along_keys(slopes, count, runs, parts);
        weighted_sums<X>(slope_columns, of_row.key_rows, runs, parts, row.keys, count, size_.head_stride,
                         {grad_q_, size_.head_stride});
        for (int64_t i = 0; i < count; ++i) write_query_gradient(row, r + i, grad_q_ + i * size_.head_stride);
        // The first block writes the keys' gradients where it sees all of them, else they begin as zeros.
        const bool writes = begins && parts == 1 && begins->count == 1 && runs[0].begin == begins->runs[0].begin &&
                            runs[0].end == begins->runs[0].end;
        if (begins && !writes) no_key_gradients(row, *begins, to);
        add_key_gradients(slopes, along_rows<X>(queries, count, size_.head_stride, query_rows_), count, runs, parts,
                          row.keys, size_.head_stride, to.keys, !writes);
        add_key_gradients(weights, along_rows<X>(grad_a, count, size_.value_stride, grad_a_rows_), count, runs, parts,
                          row.keys, size_.value_stride, to.values, !writes || p.v_is_k);
    }

    void no_key_gradients(const Row& row, const ColumnRuns& columns, const KeyGradients& to) const {
        for (int i = 0; i < columns.count; ++i)
            for (int64_t j = columns.runs[i].begin; j < least(columns.runs[i].end, row.keys); ++j) {
                fill(to.keys.from(j).data, size_.head_stride, A(0));
                fill(to.values.from(j).data, size_.value_stride, A(0));
            }
    }

    // From grad_out to the gradients of A and of the gate.
    void back_through_epilogue(const Row& row, int64_t r, S* grad_a) const {
        const int64_t channels = p.value_size;
        widen(row.at(p.grad_out, r), p.grad_out.channel, channels, extra_);
        if (p.gate.given) {
            widen(row.template at<A>(p.attn_out, r), p.attn_out.channel, channels, attn_out_);
            widen(row.at(p.gate, r), p.gate.channel, channels, gate_);
            back_through_gate(p.gating, attn_out_, gate_, extra_, channels);
            if (p.gate_summed)
                add_gate_gradient(row.template at<double>(p.grad_gate, r) + run_ * p.gate_run);
            else
                add_gate_gradient(row.template at<A>(p.grad_gate, r));
        }
        if (!p.score.softmax && p.post_scale != 1) {
            const A factor = static_cast<A>(p.post_scale);
            for (int64_t c = 0; c < channels; ++c) extra_[c] *= factor;
        }
        narrow(extra_, channels, grad_a);
        fill(grad_a + channels, size_.value_stride - channels, S{});
    }

    template <typename Sum>
    void add_gate_gradient(Sum* to) const {
        const int64_t channels = p.value_size;
        if (p.gate_channels == channels) {
            for (int64_t c = 0; c < channels; ++c) to[c] += gate_[c];
            return;
        }
        double sum = 0;  // of up to hundreds of channels
        for (int64_t c = 0; c < channels; ++c) sum += gate_[c];
        to[0] += static_cast<Sum>(sum);
    }

    // Scores become the weights of v in A, gradients of the weights those of the scores before their scaling.
    void score_gradients(const Row& row, int64_t r, int64_t count, Matrix<A> weights, Matrix<A> slopes,
                         const Columns* runs, int parts) const {
        if (!p.score.softmax) {
            for (int64_t i = 0; i < count; ++i)
                row.activate_with_gradients(r + i, weights.from(i).data, slopes.from(i).data, runs, parts);
            return;
        }
        row.weigh(r, count, weights, runs, parts, {largest_, sums_, means_}, slopes.data);
        for (int64_t i = 0; i < count; ++i)
            for (int part = 0; part < parts; ++part)
                through_softmax(weights.from(i).data, slopes.from(i).data, runs[part].begin, runs[part].end,
                                A(1) / sums_[i], means_[i], row.score_scale());
    }
    static void through_softmax(A* w, A* s, int64_t begin, int64_t end, A share, A mean, A scale) {
        for (int64_t j = begin; j < end; ++j) {
            w[j] *= share;
            s[j] = w[j] * (s[j] - mean) * scale;
        }
    }

    // A block's slopes as operands of sums over keys: where they lie, or copied.
    Scalars<X> along_keys(Matrix<A> slopes, int64_t count, const Columns* runs, int parts) const {
        if constexpr (std::is_same_v<X, A>) return {slopes.data, slopes.stride, 1};
        for (int64_t i = 0; i < count; ++i)
            for (int part = 0; part < parts; ++part)
                pair_columns<X>(slopes.from(i).data, runs[part].begin, runs[part].end,
                                slope_columns_ + i * slopes.stride);
        return {operands_in<X>(slope_columns_), slopes.stride, 1};
    }

    // A block's share of the gradients of the keys that it sees, added to what is there or (`add` false) written;
    // `weights` are no longer numbers then.
    static void add_key_gradients(Matrix<A> weights, Matrix<const X> queries, int64_t count, const Columns* runs,
                                  int parts, int64_t keys, int64_t channels, Matrix<A> to, bool add) {
        for (int i = 0; i < parts; ++i) {
            const int64_t j = runs[i].begin;
            pair_rows<X>(weights, count, j, runs[i].end);
            multiply<X>({operands_in<X>(weights.data) + j, 1, kNumbers<X> * weights.stride}, queries,
                        least(runs[i].end, keys) - j, channels, operands<X>(count), to.from(j), add);
        }
    }

    void write_query_gradient(const Row& row, int64_t r, A* grad) const {
        for (int64_t c = 0; c < p.head_size; ++c) grad[c] *= row.sign();
        if (p.shared_queries) {
            double* to = row.template at<double>(p.grad_q, r) + run_ * p.query_run;
            for (int64_t c = 0; c < p.head_size; ++c) to[c] += grad[c];
            return;
        }
        if (p.rope.cos) turn(p.rope, row.query_position(r), A(-1), grad);
        narrow(grad, p.head_size, row.at(p.grad_q, r));
    }

    const AttentionProblem& p;
    Sizes<T> size_;
    int64_t run_, bytes_;
    S *keys_, *values_, *queries_, *grad_a_;
    X *packed_keys_, *packed_values_, *key_rows_ = nullptr, *query_rows_ = nullptr, *grad_a_rows_ = nullptr;
    A *scores_, *slopes_, *largest_, *sums_, *means_, *slope_columns_ = nullptr, *grad_q_, *grad_k_, *grad_v_, *extra_,
                                                      *attn_out_, *gate_, *part_sums_ = nullptr;
};

INTERFORMER_LEVEL_END
