// The keys that a query sees, by the masks of docs/ops.md.
#pragma once

#include "cpu/attention_problem.h"
#include "cpu/kernels/multiply.h"

INTERFORMER_ISA_BEGIN

// One row of the batch under one key/value head. Query `r` of [0, query_tokens * q_per_kv) is token `token(r)` of the
// row under query head `head(r)`. The last `targets` tokens of queries and keys are targets.
struct RowOfHead {
    int64_t index, kv_head, query_tokens, keys, q_per_kv;
    int64_t targets = 0;

    // Avoids the division where heads are not grouped: it would cost as much as the products of a short row.
    int64_t token(int64_t r) const { return q_per_kv == 1 ? r : r / q_per_kv; }
    int64_t head(int64_t r) const { return kv_head * q_per_kv + r - token(r) * q_per_kv; }
    int64_t queries() const { return query_tokens * q_per_kv; }

    int64_t history() const { return keys - targets; }  // the keys that are no targets
    bool is_target(int64_t token) const { return token >= query_tokens - targets; }
    // Where a query token stands among the keys.
    int64_t place(int64_t token) const { return is_target(token) ? history() : token + keys - query_tokens; }
};

inline RowOfHead row_of_head(const AttentionProblem& p, int64_t row, int64_t kv_head, int64_t q_per_kv) {
    return {row,
            kv_head,
            p.query_counts ? p.query_counts[row] : p.queries,
            p.key_counts[row],
            q_per_kv,
            p.target_counts ? p.target_counts[row] : 0};
}

// The keys that one query sees: [0, prefix), [first, last), and behind them one key of its own, which is -1 for most.
struct KeyRange {
    int64_t prefix, first, last, own;

    bool fully_masked() const { return prefix == 0 && first >= last && own < 0; }
};

inline bool has_masks(const AttentionVariant& v, const RowOfHead& row) {
    return v.causal || v.window_left >= 0 || v.window_right >= 0 || row.targets > 0;
}

// Causality and windows compare places: that of the query, and that of a key `j`, which is `j`. Where the prefix is one
// place, place 0, the key of a later place `x` is `x + shift`.
inline KeyRange key_range_of(const AttentionVariant& v, const RowOfHead& row, int64_t token) {
    const int64_t history = row.history();
    const bool is_target = row.is_target(token), by_index = v.prefix == Prefix::index;
    const int64_t own = is_target ? token + row.keys - row.query_tokens : -1, at = row.place(token);
    if (!is_target && (by_index ? at < v.num_prefix : v.prefix == Prefix::full && token < v.num_prefix))
        return {0, 0, history, own};
    const int64_t shift = by_index ? min(v.num_prefix, history + 1) - 1 : 0;
    const int64_t place = by_index ? max(at - shift, 0) : at;
    KeyRange range{by_index ? 0 : min(v.num_prefix, history), 0, history, own};
    if (v.causal) {
        range.last = min(range.last, place + shift + 1);
        if (v.prefix == Prefix::keys) range.prefix = min(range.prefix, max(range.last, 0));
    }
    if (v.full_tail == 0 || token < row.query_tokens - row.targets - v.full_tail) {
        const int64_t least = place - v.window_left;
        if (v.window_left >= 0 && !(by_index && least <= 0)) range.first = max(range.first, least + shift);
        if (v.window_right >= 0) range.last = min(range.last, place + v.window_right + shift + 1);
    }
    range.last = max(range.last, 0);
    range.first = min(range.first, range.last);
    if (range.first <= range.prefix) {  // the prefix and the rest are adjacent
        range.last = max(range.last, range.prefix);
        range.first = 0;
        range.prefix = 0;
    }
    return range;
}

// The keys that at least one of several queries sees.
class VisibleKeys {
  public:
    explicit VisibleKeys(int64_t keys) : first_(keys), first_own_(keys) {}

    void include(const KeyRange& range) {
        prefix_ = max(prefix_, range.prefix);
        if (range.own >= 0) {
            first_own_ = min(first_own_, range.own);
            last_own_ = max(last_own_, range.own + 1);
        }
        if (range.first >= range.last) return;
        first_ = min(first_, range.first);
        last_ = max(last_, range.last);
    }
    // As columns of scores of type A, rounded outwards to panels and vectors.
    template <typename A>
    ColumnRanges columns() const {
        ColumnRanges ranges{};
        add<A>(ranges, 0, prefix_);
        add<A>(ranges, first_, last_);
        add<A>(ranges, first_own_, last_own_);
        return ranges;
    }

  private:
    // Ranges that touch once they are rounded become one.
    template <typename A>
    static void add(ColumnRanges& ranges, int64_t first, int64_t last) {
        if (first >= last) return;
        const int64_t begin = first / kPanel<A> * kPanel<A>, end = round_up(last, kLanes<A>);
        if (ranges.n > 0 && begin <= ranges.r[ranges.n - 1].end) {
            Columns& before = ranges.r[ranges.n - 1];
            before.begin = min(before.begin, begin);
            before.end = max(before.end, end);
        } else {
            ranges.r[ranges.n++] = {begin, end};
        }
    }

    int64_t prefix_ = 0, first_, last_ = 0, first_own_, last_own_ = 0;
};

INTERFORMER_ISA_END
