// Backward of attention, in one pass over the queries. Scores and probabilities P are computed again, then
//
//     dP = dO V'
//     dS = P * (dP - delta + dlse), delta = sum over keys of P * dP      (softmax; else act'(S) * dP)
//     dQ = scale dS K,   dK += scale dS' Q,   dV += P' dO
//
// where O is attn_out. Without softmax P is act(S), and dO contains the factor of P.
#pragma once

#include "cpu/kernels/attention_row.h"
#include "cpu/kernels/few_queries_backward.h"

INTERFORMER_ISA_BEGIN

// A thread's memory. Strides are those of `Sizes`.
template <typename T>
struct BackwardWorkspace {
    using A = Acc<T>;
    using S = Stored<T>;
    using X = Operand<T>;

    S* keys;           // [max_keys, head_stride]
    S* values;         // [max_keys, value_stride]; the keys where v is k, as with every pair of keys and values below
    X* packed_keys;    // panels of the keys
    X* packed_values;  // panels of the values
    S* queries;        // [max_block, head_stride]
    S* grad_attn_out;  // [max_block, value_stride]
    A* probs;          // [block, score_stride], at first the scores
    A* d_probs;        // [block, score_stride], later d_scores
    A* row_sum;        // [max_block], and likewise delta
    A* delta;
    A* sink;
    A* slopes = nullptr;  // [block, score_stride], under a softcap
    A* grad_q;            // [max_block, head_stride]
    A* grad_k;            // [max_keys, head_stride]
    A* grad_v;            // [max_keys, value_stride]
    A* grad_out;          // the channels of one token
    A* epilogue;          // those of two
    // Operands of pairs of numbers, where the instruction set has them.
    X* key_rows = nullptr;            // [operands of max_keys, head_stride]
    X* query_rows = nullptr;          // [operands of max_block, head_stride]
    X* grad_attn_out_rows = nullptr;  // [operands of max_block, value_stride]
    A* d_score_pairs = nullptr;       // [block, score_stride]
    KeyBias<A> bias;
    A* shard_grads = nullptr;  // [max_keys, head_stride + value_stride], where a row may have several shards
    int64_t bytes;

    BackwardWorkspace(const AttentionProblem& p, const Sizes<T>& sizes, void* memory)
        : BackwardWorkspace(p, sizes, Arena(memory)) {}
    BackwardWorkspace(const AttentionProblem& p, const Sizes<T>& sizes, Arena arena)
        : bias(p, sizes.max_scores(p), arena) {
        const int64_t panels = round_up(p.max_keys, kPanel<X>), block = sizes.max_block(p);
        const int64_t scores = sizes.max_scores(p), channels = max(sizes.head_stride, sizes.value_stride);
        keys = arena.allocate<S>(p.max_keys * sizes.head_stride);
        values = p.v_is_k ? keys : arena.allocate<S>(p.max_keys * sizes.value_stride);
        packed_keys = arena.allocate<X>(panels * operands<X>(sizes.head_stride));
        packed_values = p.v_is_k ? packed_keys : arena.allocate<X>(panels * operands<X>(sizes.value_stride));
        queries = arena.allocate<S>(block * sizes.head_stride);
        grad_attn_out = arena.allocate<S>(block * sizes.value_stride);
        probs = arena.allocate<A>(scores);
        d_probs = arena.allocate<A>(scores);
        row_sum = arena.allocate<A>(round_up(block, kLanes<A>));
        delta = arena.allocate<A>(round_up(block, kLanes<A>));
        sink = arena.allocate<A>(round_up(block, kLanes<A>));
        if (p.variant.softcap > 0) slopes = arena.allocate<A>(scores);
        grad_q = arena.allocate<A>(block * sizes.head_stride);
        grad_k = arena.allocate<A>(p.max_keys * sizes.head_stride);
        grad_v = p.v_is_k ? grad_k : arena.allocate<A>(p.max_keys * sizes.value_stride);
        grad_out = arena.allocate<A>(channels);
        epilogue = arena.allocate<A>(2 * channels);
        if (kNumbers<X> > 1) {
            key_rows = arena.allocate<X>(operands<X>(p.max_keys) * sizes.head_stride);
            query_rows = arena.allocate<X>(operands<X>(block) * sizes.head_stride);
            grad_attn_out_rows = arena.allocate<X>(operands<X>(block) * sizes.value_stride);
            d_score_pairs = arena.allocate<A>(scores);
        }
        if (sizes.may_have_shards(p))
            shard_grads = arena.allocate<A>(p.max_keys * (sizes.head_stride + sizes.value_stride));
        bytes = arena.bytes();
    }
};

template <typename T>
class AttentionBackward {
  public:
    using A = Acc<T>;
    using S = Stored<T>;
    using X = Operand<T>;

    static int64_t memory(const AttentionProblem& p) {
        const AttentionBackward backward(p, 0, nullptr);
        return max(backward.work_.bytes, backward.few_queries_.bytes());
    }

    static void run(const AttentionProblem& p, const AttentionTask& task, void* memory) {
        const AttentionBackward backward(p, p.row_groups[task.first_row], memory);
        for_each_row(task, backward.few_queries_, [&](int64_t row, int64_t kv_head) {
            backward.run_row(row, kv_head, task);
            if (backward.bias()) backward.bias()->finish_row();
        });
        backward.few_queries_.finish_task();
    }

    static int64_t shards(const AttentionProblem& p, int64_t row) {
        const Sizes<T> sizes(p);
        return Row(p, sizes, row, 0, nullptr).shards();
    }
    static int64_t key_grads_bytes(const AttentionProblem& p, int64_t row) {
        const Sizes<T> sizes(p);
        return p.key_counts[row] * (sizes.head_stride + sizes.value_stride) * static_cast<int64_t>(sizeof(A));
    }
    static void add_shard(const AttentionProblem& p, const AttentionTask& task, void* memory) {
        const AttentionBackward backward(p, p.row_groups[task.first_row], memory);
        const Row row(p, backward.sizes_, task.first_row, task.first_head, nullptr);
        const KeyGradients sums = backward.key_gradients_in(row, task.key_grads);
        if (task.shard > 0)
            backward.add(row, row.shard_columns(task.shard), backward.key_gradients_in(row, backward.work_.shard_grads),
                         sums);
        if (task.shard + 1 == row.shards()) backward.write_key_gradients(row, sums);
    }

  private:
    using Row = AttentionRow<T>;

    // The operands that all queries of a row are multiplied with.
    struct RowOperands {
        PackedOperand<T> keys, values;
        Matrix<const X> key_rows;
        NextHead next;
    };
    // Sums of the gradients of a row's keys and values, one matrix where v is k.
    struct KeyGradients {
        Matrix<A> keys, values;
    };

    AttentionBackward(const AttentionProblem& problem, int64_t row_group, void* memory)
        : p_(problem),
          sizes_(problem),
          work_(problem, sizes_, memory),
          epilogue_(problem, row_group, work_.epilogue),
          few_queries_(problem, row_group, memory) {}

    void run_row(int64_t batch_row, int64_t kv_head, const AttentionTask& task) const {
        const Row row(p_, sizes_, batch_row, kv_head, work_.grad_out);
        const ColumnRanges ranges = row.shard_columns(task.shard);
        if (bias()) work_.bias.begin_row(row.variant().row());
        const Matrix<const S> keys = row.tokens(p_.k, ranges, p_.head_size, p_.rope.cos, work_.keys);
        const Matrix<const S> values = p_.v_is_k ? keys : row.tokens(p_.v, ranges, p_.value_size, false, work_.values);
        const PackedOperand<T> packed_keys(keys, row.keys(), ranges, sizes_.head_stride, work_.packed_keys);
        const RowOperands operands{
            packed_keys,
            p_.v_is_k ? packed_keys
                      : PackedOperand<T>(values, row.keys(), ranges, sizes_.value_stride, work_.packed_values),
            row.tokens_along_rows(keys, ranges, sizes_.head_stride, work_.key_rows),
            NextHead::of<T>(p_, task, batch_row, kv_head)};
        if (task.shard > 0) {
            run_later_shard(row, task.shard, operands);
            return;
        }
        const KeyGradients sums = task.shard < 0 ? row_key_gradients(row) : key_gradients_in(row, task.key_grads);
        run_shard(row, 0, operands, row.variant().all_columns(), sums);
        if (task.shard == 0) return;
        for (int64_t shard = 1; shard < row.shards(); ++shard)
            add(row, row.shard_columns(shard), run_later_shard(row, shard, operands), sums);
        write_key_gradients(row, sums);
    }

    KeyBias<A>* bias() const { return work_.bias.given() ? &work_.bias : nullptr; }

    // ---------------------------------------------------------------- gradients of keys and values

    KeyGradients key_gradients_in(const Row& row, void* memory) const {
        A* numbers = static_cast<A*>(memory);
        const Matrix<A> keys{numbers, sizes_.head_stride};
        if (p_.v_is_k) return {keys, keys};
        return {keys, {numbers + row.keys() * sizes_.head_stride, sizes_.value_stride}};
    }
    KeyGradients row_key_gradients(const Row& row) const {
        const Matrix<A> keys = output_or(work_.grad_k, row, p_.grad_k, p_.head_size, p_.rope.cos);
        return {keys, p_.v_is_k ? keys : output_or(work_.grad_v, row, p_.grad_v, p_.value_size, false)};
    }
    // The output itself where one block of queries computes it whole; else `memory`, which is dense, so that later
    // blocks find it in the cache.
    static Matrix<A> output_or(A* memory, const Row& row, const RowTensor& grad, int64_t channels, bool rotated) {
        if constexpr (std::is_same_v<T, A>)
            if (row.queries() <= row.block() && !rotated && channels % kLanes<A> == 0)
                return {row.key_at(grad, 0), grad.token};
        return {memory, padded<X>(channels)};
    }

    void add(const Row& row, const ColumnRanges& ranges, const KeyGradients& shard, const KeyGradients& sums) const {
        for (int i = 0; i < ranges.n; ++i) {
            const int64_t begin = ranges.r[i].begin, count = min(ranges.r[i].end, row.keys()) - begin;
            add(shard.keys.from(begin).data, count * sizes_.head_stride, sums.keys.from(begin).data);
            if (!p_.v_is_k)
                add(shard.values.from(begin).data, count * sizes_.value_stride, sums.values.from(begin).data);
        }
    }
    static void add(const A* x, int64_t count, A* sums) {
        for (int64_t i = 0; i < count; ++i) sums[i] += x[i];
    }

    void zero_key_gradients(const Row& row, const ColumnRanges& ranges, const KeyGradients& grads) const {
        for (int i = 0; i < ranges.n; ++i)
            for (int64_t j = ranges.r[i].begin; j < min(ranges.r[i].end, row.keys()); ++j) {
                fill(grads.keys.from(j).data, sizes_.head_stride, A(0));
                fill(grads.values.from(j).data, sizes_.value_stride, A(0));
            }
    }

    void write_key_gradients(const Row& row, const KeyGradients& sums) const {
        write_key_gradients(row, sums.keys, p_.grad_k, p_.head_size, p_.rope.cos);
        if (!p_.v_is_k) write_key_gradients(row, sums.values, p_.grad_v, p_.value_size, false);
    }
    void write_key_gradients(const Row& row, Matrix<A> sums, const RowTensor& grad, int64_t channels,
                             bool rotated) const {
        if (static_cast<void*>(sums.data) == row.key_at(grad, 0)) return;  // summed in place
        for (int64_t j = 0; j < row.keys(); ++j) {
            A* sum = sums.from(j).data;
            if (rotated) rotate(p_.rope, row.key_position(j), A(-1), sum);
            narrow(sum, channels, row.key_at(grad, j));
        }
    }

    // ---------------------------------------------------------------- shards and blocks of queries

    // Writes the gradients of the keys in the ranges under the queries of one shard to `grads`; zeros without queries.
    void run_shard(const Row& row, int64_t shard, const RowOperands& operands, const ColumnRanges& ranges,
                   const KeyGradients& grads) const {
        const int64_t first = shard * row.shard(), last = min(first + row.shard(), row.queries());
        if (first >= last) zero_key_gradients(row, ranges, grads);
        for (int64_t r = first; r < last; r += row.block())
            run_block(row, r, min(row.block(), last - r), r == first ? &ranges : nullptr, operands, grads);
    }
    // A later shard has memory of its own, and touches only the keys that its queries see. So the cost of a row of many
    // shards follows from what its queries see.
    KeyGradients run_later_shard(const Row& row, int64_t shard, const RowOperands& operands) const {
        const KeyGradients grads = key_gradients_in(row, work_.shard_grads);
        run_shard(row, shard, operands, row.shard_columns(shard), grads);
        return grads;
    }

    // `shard_ranges`: the columns of the shard, given with its first block alone, which initialises their gradients.
    void run_block(const Row& row, int64_t r, int64_t count, const ColumnRanges* shard_ranges,
                   const RowOperands& operands, const KeyGradients& grads) const {
        const ColumnRanges ranges = row.variant().column_ranges(r, count);
        const Matrix<A> probs{work_.probs, row.score_stride()}, d_probs{work_.d_probs, row.score_stride()};
        const Matrix<const S> queries = row.query_rows(r, count, work_.queries);
        const Matrix<const S> grad_attn_out{work_.grad_attn_out, sizes_.value_stride};
        for (int64_t i = 0; i < count; ++i)
            epilogue_backward(row, r + i, work_.grad_attn_out + i * sizes_.value_stride);
        const NextHead next = r == 0 ? operands.next : NextHead{};
        operands.keys.multiply(queries, count, ranges, probs, next.keys);
        operands.values.multiply(grad_attn_out, count, ranges, d_probs, next.values);
        row.variant().scores_to_probs_and_d_scores(r, count, probs, d_probs, ranges,
                                                   {work_.row_sum, work_.delta, work_.sink, work_.slopes, bias()});
        const Matrix<A> d_scores = d_probs;
        weighted_sums<X>(along_keys(d_scores, count, ranges), operands.key_rows, ranges, row.keys(), count,
                         sizes_.head_stride, {work_.grad_q, sizes_.head_stride});
        for (int64_t i = 0; i < count; ++i)
            epilogue_.write_grad_q(row.query(r + i), row.query_position(r + i), row.variant().query_sign(),
                                   work_.grad_q + i * sizes_.head_stride);
        // The first block writes the gradients where it sees all keys of the shard; else they begin as zeros.
        const bool writes = shard_ranges && ranges.n == 1 && shard_ranges->n == 1 &&
                            ranges.r[0].begin == shard_ranges->r[0].begin && ranges.r[0].end == shard_ranges->r[0].end;
        if (shard_ranges && !writes) zero_key_gradients(row, *shard_ranges, grads);
        add_key_gradients(d_scores, along_rows<X>(queries, count, sizes_.head_stride, work_.query_rows), count, ranges,
                          row.keys(), sizes_.head_stride, grads.keys, !writes);
        add_key_gradients(probs, along_rows<X>(grad_attn_out, count, sizes_.value_stride, work_.grad_attn_out_rows),
                          count, ranges, row.keys(), sizes_.value_stride, grads.values, !writes || p_.v_is_k);
    }

    // d_scores as operands of sums over keys: in place, or copied in pairs.
    Scalars<X> along_keys(Matrix<A> d_scores, int64_t count, const ColumnRanges& ranges) const {
        if constexpr (std::is_same_v<X, A>) return {d_scores.data, d_scores.stride, 1};
        for (int64_t i = 0; i < count; ++i)
            for (int range = 0; range < ranges.n; ++range)
                pair_columns<X>(d_scores.from(i).data, ranges.r[range].begin, ranges.r[range].end,
                                work_.d_score_pairs + i * d_scores.stride);
        return {operands_in<X>(work_.d_score_pairs), d_scores.stride, 1};
    }

    // Adds x' rows, for probs or d_scores `x`, to the gradients of the keys in the ranges, or writes them where `add`
    // is false. `x` is overwritten by operands.
    static void add_key_gradients(Matrix<A> x, Matrix<const X> rows, int64_t count, const ColumnRanges& ranges,
                                  int64_t keys, int64_t channels, Matrix<A> grads, bool add) {
        for (int i = 0; i < ranges.n; ++i) {
            const int64_t j = ranges.r[i].begin;
            pair_rows<X>(x, count, j, ranges.r[i].end);
            multiply<X>({operands_in<X>(x.data) + j, 1, kNumbers<X> * x.stride}, rows, min(ranges.r[i].end, keys) - j,
                        channels, operands<X>(count), grads.from(j), add);
        }
    }

    // The gradient of attn_out under one query, stored for products.
    void epilogue_backward(const Row& row, int64_t r, S* grad_attn_out) const {
        epilogue_.grad_attn_out(row.query(r), work_.grad_out);
        narrow(work_.grad_out, p_.value_size, grad_attn_out);
        fill(grad_attn_out + p_.value_size, sizes_.value_stride - p_.value_size, S{});
    }

    const AttentionProblem& p_;
    const Sizes<T> sizes_;
    mutable BackwardWorkspace<T> work_;
    const EpilogueBackward<T> epilogue_;
    const FewQueriesBackward<T> few_queries_;  // in the same memory: a thread computes one row at a time
};

INTERFORMER_ISA_END
