// Forward of attention for rows of few queries.
#pragma once

#include "cpu/kernels/few_query_row.h"

INTERFORMER_ISA_BEGIN

template <typename T>
class FewQueriesForward {
  public:
    using A = Acc<T>;

    FewQueriesForward(const AttentionProblem& problem, void* memory) : FewQueriesForward(problem, Arena(memory)) {}

    int64_t bytes() const { return bytes_; }
    bool serves(int64_t row) const { return shared_.serves(row); }

    void run_row(int64_t row, int64_t first_head, int64_t last_head) const {
        if (shared_.queries_of(row) == 0) return;
        shared_.for_heads(row, first_head, last_head,
                          [&](int64_t head, int64_t heads) { run_heads({shared_, row, head, heads}); });
    }

  private:
    using Row = FewQueryRow<T>;

    FewQueriesForward(const AttentionProblem& problem, Arena arena)
        : p_(problem),
          shared_(problem, arena),
          scores_(arena.allocate<A>(kFewUnits * kTokenBlock)),
          attn_out_(arena.allocate<A>(kFewUnits * shared_.value.padded())),
          epilogue_(problem, arena.allocate<A>(kFewUnits * shared_.value.padded())),
          heads_adjoin_(shared_.value.tail == 0 && epilogue_.heads_adjoin()),
          plain_(heads_adjoin_ && problem.variant.score.softmax && !problem.gate.given && !problem.residual.given &&
                 !problem.attn_out.given),
          bytes_(arena.bytes()) {}

    void run_heads(const Row& row) const {
        FewQueryScores<T> scores(p_, row.variant(), row.units());
        row.queries();
        const A* queries = shared_.for_dots;
        const ColumnRanges ranges = row.variant().column_ranges(0, row.units().queries);
        const HeadTokens<const T> values = read_only(row.tokens(p_.v));
        for (int i = 0; i < ranges.n; ++i)
            row.for_key_blocks(ranges.r[i].begin, min(ranges.r[i].end, row.keys()),
                               [&](const auto& keys, int64_t first, int64_t count) {
                                   if (p_.v_is_k)
                                       add_block(row.units(), queries, scores, keys, keys, first, count);
                                   else
                                       add_block(row.units(), queries, scores, keys, values.from(first), first, count);
                               });
        if (ranges.n == 0) fill(attn_out_, row.units().count() * shared_.value.padded(), A(0));
        finish(row, scores);
    }

    template <typename K, typename V>
    void add_block(const Units& units, const A* queries, FewQueryScores<T>& scores, const HeadTokens<const K>& keys,
                   const HeadTokens<const V>& values, int64_t first, int64_t count) const {
        const UnitNumbers<A> numbers{scores_, kTokenBlock * kGroup<A>};
        TokenDots<K>(units, shared_.head)(keys, count, queries, numbers,
                                          tokens_ahead(values, units.heads, p_.value_size));
        scores.scores_to_probs(first, count, numbers);
        WeightedTokens<V>(units, shared_.value)({numbers.data, numbers.stride}, values, count, attn_out_, scores.add(),
                                                scores.factors());
    }

    void finish(const Row& row, FewQueryScores<T>& scores) const {
        const int64_t padded = shared_.value.padded();
        const bool softmax = p_.variant.score.softmax;
        if (softmax) scores.finish(p_.lse.given);
        if (softmax && p_.lse.given)
            row.for_units([&](int64_t unit, const QueryPlace& query) { *query.at<A>(p_.lse) = scores.lse()[unit]; });
        if (plain_) return write_plain(row, scores);
        row.for_units([&](int64_t unit, const QueryPlace& query) {
            A* sums = attn_out_ + unit * padded;
            if (softmax) normalise<T>(sums, p_.value_size, scores.inv_row_sum()[unit]);
            if (!heads_adjoin_) epilogue_.finish(query, sums, p_.value_size);
        });
        const Units& units = row.units();
        for (int64_t r = 0; heads_adjoin_ && r < units.queries; ++r)
            epilogue_.finish(row.first_unit(r), attn_out_ + r * units.heads * padded, units.heads * padded);
    }

    // Means of whole vectors, without gate and residual.
    void write_plain(const Row& row, const FewQueryScores<T>& scores) const {
        const Units& units = row.units();
        const A *sums = attn_out_, *factor = scores.inv_row_sum();
        for (int64_t r = 0; r < units.queries; ++r) {
            T* to = row.first_unit(r).template at<T>(p_.out);
            for (int64_t head = 0; head < units.heads; ++head, ++factor)
                for (int64_t c = 0; c < p_.value_size; c += kLanes<A>, sums += kLanes<A>, to += kLanes<A>)
                    store_wide(to, mean_of<T>(load_vector(sums), Vector<A>{} + *factor));
        }
    }

    const AttentionProblem& p_;
    const FewQueries<T> shared_;
    A *scores_, *attn_out_;
    const Epilogue<T> epilogue_;
    const bool heads_adjoin_, plain_;
    const int64_t bytes_;
};

INTERFORMER_ISA_END
