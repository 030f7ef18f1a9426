// One row of few queries under some key/value heads, as the forward and the backward share it.
#pragma once

#include "cpu/kernel_table.h"
#include "cpu/kernels/attention_epilogue.h"
#include "cpu/kernels/few_query_dots.h"
#include "cpu/kernels/few_query_scores.h"

INTERFORMER_ISA_BEGIN

// The settings that all rows of few queries share, and a thread's memory for one row.
template <typename T>
struct FewQueries {
    using A = Acc<T>;

    const AttentionProblem& p;
    int64_t q_per_kv;
    Channels<A> head, value;
    A* queries;  // [kFewUnits, head]; padded with zeros to whole vectors and groups
    A* turned;   // the same, turned
    A* rotated;  // [kTokenBlock, heads, head], where keys are rotated
    bool plain_queries;
    bool leaves_few;  // to the kernels of many queries: dropout, bias, and queries whose bits are independent
    // Queries that all rows share are read once for a task; the heads whose queries the buffers hold.
    bool same_queries;
    mutable const A *ready = nullptr, *for_dots = nullptr;
    mutable int64_t ready_head = 0, ready_heads = 0;

    FewQueries(const AttentionProblem& problem, Arena& arena)
        : p(problem),
          q_per_kv(problem.heads / max(problem.kv_heads, 1)),
          head(problem.head_size),
          value(problem.value_size) {
        queries = arena.allocate<A>(kFewUnits * head.padded());
        turned = arena.allocate<A>(kFewUnits * head.padded());
        rotated = arena.allocate<A>(p.rope.cos ? kTokenBlock * kFewUnits * head.padded() : 0);
        leaves_few =
            p.dropout.some || p.dropout.all || p.position_bias.table || p.time_bias.table || p.variant.queries_apart;
        plain_queries = !p.rope.cos && p.variant.scale > 0;
        same_queries = !p.q.begins && p.q.row == 0 && !p.rope.cos;
    }

    int64_t queries_of(int64_t row) const { return (p.query_counts ? p.query_counts[row] : p.queries) * q_per_kv; }
    bool serves(int64_t row) const { return queries_of(row) <= kFewQueries && !leaves_few; }

    // Calls `each(first_head, heads)` for the heads of a task in as many steps as units need.
    template <typename Each>
    void for_heads(int64_t row, int64_t first, int64_t last, Each&& each) const {
        const int64_t queries = queries_of(row);
        if (queries * (last - first) <= kFewUnits) return each(first, last - first);
        const int64_t step = kFewUnits / queries;
        for (int64_t head = first; head < last; head += step) each(head, min(step, last - head));
    }
};

template <typename T>
class FewQueryRow {
  public:
    using A = Acc<T>;

    INTERFORMER_INLINE FewQueryRow(const FewQueries<T>& shared, int64_t row, int64_t first_head, int64_t heads)
        : p_(shared.p),
          shared_(shared),
          variant_(shared.p, row_of_head(shared.p, row, first_head, shared.q_per_kv)),
          row_(variant_.row()),
          units_{heads, row_.queries()} {}

    const Units& units() const { return units_; }
    const ScoreVariant<T>& variant() const { return variant_; }
    int64_t keys() const { return row_.keys; }

    int64_t query_position(int64_t token) const {
        return position_of(p_.positions_q, p_.query_begins ? p_.query_begins[row_.index] : 0, token);
    }
    int64_t key_position(int64_t j) const { return position_of(p_.positions_k, p_.key_begins[row_.index], j); }

    // Calls `each(unit, query)` for all units.
    template <typename Each>
    INTERFORMER_INLINE void for_units(Each&& each) const {
        int64_t unit = 0;
        for (int64_t token = 0; token < row_.query_tokens; ++token)
            for (int64_t i = 0; i < row_.q_per_kv; ++i)
                for (int64_t head = 0; head < units_.heads; ++head, ++unit)
                    each(unit, QueryPlace{row_.index, token, (row_.kv_head + head) * row_.q_per_kv + i});
    }
    // The first head of a query token, where heads are not grouped.
    QueryPlace first_unit(int64_t token) const { return {row_.index, token, row_.kv_head}; }

    // Whether a tensor of the queries' layout has the row's units side by side, as rows of whole vectors.
    bool side_by_side(const RowTensor& x, int64_t channels) const {
        return channels % kLanes<A> == 0 && row_.q_per_kv == 1 && units_.heads == p_.heads && x.channel == 1 &&
               x.head == channels && x.token == p_.heads * channels;
    }
    // Those rows in place, or widened in `copy`.
    const A* rows_of(const RowTensor& x, int64_t channels, A* copy) const {
        const T* first = address<T>(x, row_.index, 0, row_.kv_head);
        if constexpr (std::is_same_v<T, A>)
            if (units_.count() % kGroup<A> == 0) return first;
        widen(first, 1, units_.count() * channels, copy);
        return zero_padded(copy, channels);
    }

    // The row's queries, rotated; `FewQueries::for_dots` then has them for `TokenDots`. Their products with keys are
    // yet to be multiplied by `score_scale`.
    const A* queries() const {
        const bool known = shared_.ready && shared_.ready_head == row_.kv_head && shared_.ready_heads == units_.heads;
        if (shared_.same_queries && known) return shared_.ready;
        shared_.ready = read_queries();
        shared_.ready_head = row_.kv_head;
        shared_.ready_heads = units_.heads;
        shared_.for_dots = for_dots(shared_.ready, shared_.head, shared_.turned);
        return shared_.ready;
    }

    // Rows of the units as `TokenDots` takes them: turned, or as they are.
    const A* for_dots(const A* rows, const Channels<A>& channels, A* to) const {
        if (!turns(units_, channels)) return rows;
        turn_rows<A>(rows, units_.template groups<A>(), channels, to);
        return to;
    }

    // Fills the rows behind the last unit, up to a whole group.
    const A* zero_padded(A* rows, int64_t padded) const {
        const int64_t units = units_.count(), missing = units_.groups<A>() * kGroup<A> - units;
        if (missing > 0) fill(rows + units * padded, missing * padded, A(0));
        return rows;
    }

    // The row's tokens of a tensor with the layout of the keys.
    HeadTokens<T> tokens(const RowTensor& x) const {
        return {address<T>(x, row_.index, 0, row_.kv_head), x.token, x.head};
    }

    // Calls `use(tokens, first, count)` for blocks of the keys [begin, end), rotated, in order.
    template <typename Use>
    void for_key_blocks(int64_t begin, int64_t end, Use&& use) const {
        const HeadTokens<const T> keys = read_only(tokens(p_.k));
        for (int64_t j = begin; j < end; j += kTokenBlock) {
            const int64_t count = min(kTokenBlock, end - j);
            if (p_.rope.cos)
                use(rotated(keys, j, count), j, count);
            else
                use(keys.from(j), j, count);
        }
    }

  private:
    const A* read_queries() const {
        const int64_t channels = p_.head_size, padded = shared_.head.padded();
        if (shared_.plain_queries && side_by_side(p_.q, channels)) return rows_of(p_.q, channels, shared_.queries);
        A* to = shared_.queries;
        for_units([&](int64_t, const QueryPlace& query) {
            widen(query.at<T>(p_.q), p_.q.channel, channels, to);
            if (!shared_.plain_queries) {
                if (p_.rope.cos) rotate(p_.rope, query_position(query.token), A(1), to);
                for (int64_t c = 0; c < channels; ++c) to[c] *= variant_.query_sign();
            }
            fill(to + channels, padded - channels, A(0));
            to += padded;
        });
        return zero_padded(shared_.queries, padded);
    }

    HeadTokens<const A> rotated(const HeadTokens<const T>& keys, int64_t first, int64_t count) const {
        const int64_t padded = shared_.head.padded();
        A* to = shared_.rotated;
        for (int64_t j = first; j < first + count; ++j)
            for (int64_t head = 0; head < units_.heads; ++head, to += padded) {
                widen(keys.from(j).data + head * keys.head, 1, p_.head_size, to);
                rotate(p_.rope, key_position(j), A(1), to);
            }
        return {shared_.rotated, units_.heads * padded, padded};
    }

    const AttentionProblem& p_;
    const FewQueries<T>& shared_;
    const ScoreVariant<T> variant_;
    const RowOfHead& row_;
    const Units units_;
};

INTERFORMER_ISA_END
