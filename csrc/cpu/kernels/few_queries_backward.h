// Backward of attention for rows of few queries (attention_backward.h has the formulas): a pass over k for the scores,
// one over v for the gradients of the probabilities, then one over k, which writes the gradients of both.
#pragma once

#include "cpu/kernels/few_query_outer.h"
#include "cpu/kernels/few_query_row.h"

INTERFORMER_ISA_BEGIN

template <typename T>
class FewQueriesBackward {
  public:
    using A = Acc<T>;

    FewQueriesBackward(const AttentionProblem& problem, int64_t row_group, void* memory)
        : FewQueriesBackward(problem, row_group, Arena(memory)) {}

    int64_t bytes() const { return bytes_; }
    bool serves(int64_t row) const { return shared_.serves(row); }
    void finish_task() const {
        add_sums_of_queries();
        if (stream_) finish_streams();
    }

    void run_row(int64_t row, int64_t first_head, int64_t last_head) const {
        shared_.for_heads(row, first_head, last_head,
                          [&](int64_t head, int64_t heads) { run_heads({shared_, row, head, heads}); });
    }

  private:
    using Row = FewQueryRow<T>;

    FewQueriesBackward(const AttentionProblem& problem, int64_t row_group, Arena arena)
        : p_(problem),
          shared_(problem, arena),
          row_stride_(round_up(problem.max_keys, kVectorTokens<A>) * kGroup<A>),
          probs_(arena.allocate<A>(kFewUnits / kGroup<A> * row_stride_)),
          d_probs_(arena.allocate<A>(kFewUnits / kGroup<A> * row_stride_)),
          slopes_(arena.allocate<A>(problem.variant.softcap > 0 ? row_stride_ : 0)),
          grad_attn_out_(arena.allocate<A>(kFewUnits * shared_.value.padded())),
          for_dots_(arena.allocate<A>(kFewUnits * shared_.value.padded())),
          grad_q_(arena.allocate<A>(kFewUnits * shared_.head.padded())),
          rotated_grads_(arena.allocate<A>(problem.rope.cos ? kTokenBlock * kFewUnits * shared_.head.padded() : 0)),
          epilogue_(problem, row_group, arena.allocate<A>(2 * problem.value_size)),
          stream_(problem.stream_key_grads && may_stream(problem.grad_k) &&
                  (problem.v_is_k || may_stream(problem.grad_v))),
          bytes_(arena.bytes()) {}

    // Whether vectors of elements lie at multiples of their size.
    static bool may_stream(const RowTensor& x) {
        constexpr int64_t kBytes = kLanes<A> * sizeof(T), kSize = sizeof(T);
        return reinterpret_cast<uintptr_t>(x.data) % kBytes == 0 && x.token * kSize % kBytes == 0 &&
               x.head * kSize % kBytes == 0;
    }

    void run_heads(const Row& row) const {
        const Units& units = row.units();
        if (units.queries == 0) return zero_gradients(row);
        const A* queries = row.queries();
        const A* grad_attn_out = read_grad_out(row);
        const A* dot_queries = shared_.for_dots;
        const A* dot_grads = row.for_dots(grad_attn_out, shared_.value, for_dots_);
        const UnitNumbers<A> probs{probs_, row_stride_}, d_probs{d_probs_, row_stride_};
        const HeadTokens<const T> values = read_only(row.tokens(p_.v));
        row.for_key_blocks(0, row.keys(), [&](const auto& keys, int64_t first, int64_t count) {
            dots(units, shared_.head, keys, count, dot_queries, probs.from(first));
            if (p_.v_is_k)
                dots(units, shared_.value, keys, count, dot_grads, d_probs.from(first));
            else
                dots(units, shared_.value, values.from(first), count, dot_grads, d_probs.from(first));
        });
        FewQueryScores<T> scores(p_, row.variant(), units);
        scores.scores_to_probs_and_d_scores(row.keys(), probs, d_probs, slopes_);
        write_gradients(row, {{d_probs_, row_stride_}, queries}, {{probs_, row_stride_}, grad_attn_out});
    }

    template <typename E>
    static void dots(const Units& units, const Channels<A>& channels, const HeadTokens<const E>& tokens, int64_t count,
                     const A* rows, UnitNumbers<A> to) {
        TokenDots<E>(units, channels)(tokens, count, rows, to);
    }

    // The gradients of attn_out, padded like the queries.
    const A* read_grad_out(const Row& row) const {
        if (epilogue_.is_plain() && row.side_by_side(p_.grad_out, p_.value_size))
            return row.rows_of(p_.grad_out, p_.value_size, grad_attn_out_);
        const int64_t padded = shared_.value.padded();
        A* to = grad_attn_out_;
        row.for_units([&](int64_t, const QueryPlace& query) {
            epilogue_.grad_attn_out(query, to);
            fill(to + p_.value_size, padded - p_.value_size, A(0));
            to += padded;
        });
        return row.zero_padded(grad_attn_out_, padded);
    }

    // Whether gradients of queries that rows share are summed over several rows before they are added to the sums in
    // double, one by one. It must not depend on the heads of a task.
    bool sums_queries() const { return p_.shared_queries && p_.queries * shared_.q_per_kv * p_.kv_heads <= kFewUnits; }
    // Adds the gradients of queries, summed over some rows, to the sums in double.
    void add_sums_of_queries() const {
        if (summed_.rows == 0) return;
        summed_.rows = summed_.keys = 0;
        write_grad_q({shared_, summed_.row, summed_.first_head, summed_.heads});
    }
    void write_grad_q(const Row& row) const {
        row.for_units([&](int64_t unit, const QueryPlace& query) {
            epilogue_.write_grad_q(query, row.query_position(query.token), row.variant().query_sign(),
                                   grad_q_ + unit * shared_.head.padded());
        });
    }

    // One more pass over the keys: gradients of the queries are sums over them, those of keys and values are written.
    void write_gradients(const Row& row, const UnitRows<A>& d_scores, const UnitRows<A>& probs) const {
        const HeadTokens<T> grad_k = row.tokens(p_.grad_k), grad_v = row.tokens(p_.v_is_k ? p_.grad_k : p_.grad_v);
        row.for_key_blocks(0, row.keys(), [&](const auto& keys, int64_t first, int64_t count) {
            const UnitRows<A> d_scores_here{d_scores.numbers.from(first), d_scores.rows};
            const UnitRows<A> probs_here{probs.numbers.from(first), probs.rows};
            add_grad_q(row.units(), d_scores_here.numbers, keys, count, first > 0 || summed_.rows > 0);
            write_grad_k(row, d_scores_here, p_.v_is_k ? &probs_here : nullptr, first, count, grad_k.from(first));
            if (!p_.v_is_k)
                OuterProducts<T>(row.units(), shared_.value, stream_)(probs_here, nullptr, count, grad_v.from(first),
                                                                      next_row(row, p_.v, p_.value_size, first));
        });
        const int64_t padded = shared_.head.padded();
        if (row.keys() == 0 && summed_.rows == 0) fill(grad_q_, row.units().count() * padded, A(0));
        if (sums_queries()) {
            const QueryPlace first = row.first_unit(0);
            summed_ = {first.row, first.head, row.units().heads, summed_.rows + 1, summed_.keys + row.keys()};
            if (summed_.keys >= kTokenBlock) add_sums_of_queries();
            return;
        }
        if (shared_.plain_queries && !p_.shared_queries && row.side_by_side(p_.grad_q, p_.head_size))
            return narrow(grad_q_, row.units().count() * padded, row.first_unit(0).template at<T>(p_.grad_q));
        write_grad_q(row);
    }

    // The tokens of the next row, which lie behind this one's, from a token on: where gradients leave the caches, so
    // does what is read, and computing leaves time to fetch it.
    TokensAhead next_row(const Row& row, const RowTensor& x, int64_t channels, int64_t first) const {
        constexpr int64_t kMostKeys = 256;  // the next row stays in the second level of cache
        if (!stream_ || row.keys() > kMostKeys) return {};
        return tokens_ahead(row.tokens(x).from(row.keys() + first), row.units().heads, channels);
    }

    template <typename E>
    void add_grad_q(const Units& units, UnitNumbers<const A> d_scores, const HeadTokens<const E>& keys, int64_t count,
                    bool add) const {
        WeightedTokens<E>(units, shared_.head)(d_scores, keys, count, grad_q_, add);
    }

    // Gradients of keys [first, first + count), rotated back.
    void write_grad_k(const Row& row, const UnitRows<A>& terms, const UnitRows<A>* more, int64_t first, int64_t count,
                      const HeadTokens<T>& to) const {
        if (!p_.rope.cos)
            return OuterProducts<T>(row.units(), shared_.head, stream_)(terms, more, count, to,
                                                                        next_row(row, p_.k, p_.head_size, first));
        const int64_t padded = shared_.head.padded(), heads = row.units().heads;
        OuterProducts<A>(row.units(), shared_.head)(terms, more, count, {rotated_grads_, heads * padded, padded});
        A* grad = rotated_grads_;
        for (int64_t t = 0; t < count; ++t)
            for (int64_t head = 0; head < heads; ++head, grad += padded) {
                rotate(p_.rope, row.key_position(first + t), A(-1), grad);
                narrow(grad, p_.head_size, to.from(t).data + head * to.head);
            }
    }

    // The gradients of keys that no query reads.
    void zero_gradients(const Row& row) const {
        zero(row, row.tokens(p_.grad_k), p_.head_size);
        if (!p_.v_is_k) zero(row, row.tokens(p_.grad_v), p_.value_size);
    }
    static void zero(const Row& row, const HeadTokens<T>& grads, int64_t channels) {
        for (int64_t j = 0; j < row.keys(); ++j)
            for (int64_t head = 0; head < row.units().heads; ++head)
                fill(grads.from(j).data + head * grads.head, channels, T{});
    }

    const AttentionProblem& p_;
    const FewQueries<T> shared_;
    const int64_t row_stride_;
    A *probs_, *d_probs_, *slopes_, *grad_attn_out_, *for_dots_, *grad_q_, *rotated_grads_;
    const EpilogueBackward<T> epilogue_;
    const bool stream_;
    // The rows over which `grad_q_` is summed, and the last of them.
    struct SummedRows {
        int64_t row, first_head, heads, rows, keys;
    };
    mutable SummedRows summed_{};
    const int64_t bytes_;
};

INTERFORMER_ISA_END
