// Scores of few queries: `ScoreVariant`'s masks and maps for numbers of units (few_queries.h). The forward's softmax is
// online over blocks of tokens.
#pragma once

#include "cpu/kernels/few_queries.h"
#include "cpu/kernels/score_variant.h"

INTERFORMER_ISA_BEGIN

template <typename T>
class FewQueryScores {
  public:
    using A = Acc<T>;

    INTERFORMER_INLINE FewQueryScores(const AttentionProblem& problem, const ScoreVariant<T>& variant,
                                      const Units& units)
        : p_(problem),
          variant_(variant),
          units_(units),
          scale_(variant.score_scale()),
          exponent_scale_(variant.score_scale() * kLog2OfE),
          headroom_(variant.headroom()),
          groups_(units.groups<A>()),
          masked_(variant.has_masks()) {
        if (masked_)
            for (int64_t query = 0; query < units.queries; ++query) ranges_[query] = variant.key_range(query);
    }

    // Both have a number for each unit, padded to whole groups, and are right after `finish`.
    const A* inv_row_sum() const { return inv_row_sum_; }
    const A* lse() const { return lse_; }
    // Whether there are sums of earlier blocks, and what they are multiplied by; null: 1.
    bool add() const { return blocks_ > 1; }
    const A* factors() const { return p_.variant.score.softmax ? factors_ : nullptr; }

    // Forward: the scores of tokens [first, first + count) become probabilities, those of a softmax before their
    // division by the sum.
    void scores_to_probs(int64_t first, int64_t count, UnitNumbers<A> scores) {
        ++blocks_;
        for (int64_t group = 0; group < groups_; ++group) {
            A* s = scores.data + group * scores.stride;
            if (variant_.adjusts()) variant_.adjust(s, whole_vectors(count));
            if (p_.variant.score.softmax) {
                mask_out(group, first, count, s, kMasked);
                online_softmax(group, count, s);
            } else {
                activate(p_.variant.score.activation, s, whole_vectors(count), scale_, static_cast<A>(p_.weight_scale));
                mask_out(group, first, count, s, A(0));
            }
        }
    }

    // Forward, after the last block of a softmax.
    void finish(bool with_lse) {
        const A scale = exp2_of<A>(headroom_);
        for (int64_t group = 0; group < groups_; ++group) {
            const bool begun = blocks_ > 0;
            const Vector<A> row_max = begun ? row_max_[group] : sinks(group);
            const Vector<A> sums = reduce_tokens<A>(begun ? row_sum_[group] : sum_of_sinks(), Plus{});
            const Vector<A> row_sum = sums + (row_max == kMasked ? fully_masked(group) : Vector<A>{});
            store_group(inv_row_sum_, group, A(1) / row_sum);
            if (!with_lse) continue;
            const Vector<A> lse = row_max * scale_ + logarithm(row_sum * scale);
            // Where the largest score is +inf, row_sum is NaN and does not tell whether a score was NaN.
            store_group(lse_, group, row_max == -kMasked ? with_nans(group) : lse);
        }
    }

    // Backward, for all tokens of a row: the scores become normalised probabilities, and the gradients of the
    // probabilities become those of the products of queries and keys.
    // Under a softcap `slopes` is memory for as many numbers.
    void scores_to_probs_and_d_scores(int64_t count, UnitNumbers<A> scores, UnitNumbers<A> d_probs, A* slopes) {
        const int64_t numbers = whole_vectors(count);
        for (int64_t group = 0; group < groups_; ++group) {
            A *s = scores.data + group * scores.stride, *d = d_probs.data + group * d_probs.stride;
            if (variant_.caps())
                variant_.adjust(s, numbers, slopes);
            else if (variant_.adjusts())
                variant_.adjust(s, numbers);
            if (p_.variant.score.softmax) {
                mask_out(group, 0, count, s, kMasked);
                softmax_backward(group, count, s, d);
            } else {
                activate_with_grads(p_.variant.score.activation, s, d, whole_vectors(count), scale_);
                mask_out(group, 0, count, s, A(0));
                mask_out(group, 0, count, d, A(0));
            }
            if (!variant_.adjusts()) continue;
            const A scale = variant_.product_scale();
            for (int64_t i = 0; i < numbers; ++i) d[i] *= variant_.caps() ? slopes[i] : scale;
        }
    }

  private:
    static constexpr int64_t G = kGroup<A>, W = kLanes<A>;
    static constexpr A kMasked = -__builtin_inf(), kLog2OfE = 1.44269504088896340736;
    using Index = typename IndexOf<A>::type;

    static int64_t whole_vectors(int64_t tokens) { return round_up(tokens * G, W); }
    static void store_group(A* units, int64_t group, Vector<A> x) { std::memcpy(units + group * G, &x, 16); }

    static Vector<Index> token_of_lane() {
        Vector<Index> tokens;
#pragma GCC unroll 16
        for (int lane = 0; lane < W; ++lane) tokens[lane] = lane / G;
        return tokens;
    }
    int64_t query_of(int64_t unit) const { return min(unit, units_.count() - 1) / units_.heads; }

    // Sets the numbers of tokens that a unit does not see, and of those behind the last, to `masked`.
    void mask_out(int64_t group, int64_t first, int64_t count, A* s, A masked) const {
        const Vector<A> all_masked = Vector<A>{} + masked;
        if (!masked_) {
            const int64_t last = (count - 1) / kVectorTokens<A> * kVectorTokens<A>;
            const Vector<Index> here = token_of_lane() < static_cast<Index>(count - last);
            if (count > last && count - last < kVectorTokens<A>)
                store_vector(s + last * G, here ? load_vector(s + last * G) : all_masked);
            return;
        }
        Vector<Index> prefix, begin, end, own;  // relative to the block's first token
        for (int64_t lane = 0; lane < W; ++lane) {
            const KeyRange& range = ranges_[query_of(group * G + lane % G)];
            const auto clamped = [&](int64_t key) { return static_cast<Index>(min(max(key - first, 0), count)); };
            prefix[lane] = clamped(range.prefix);
            begin[lane] = clamped(range.first);
            end[lane] = clamped(range.last);
            own[lane] = range.own < first ? Index(-1) : clamped(range.own);
        }
        Vector<Index> token = token_of_lane();
        for (int64_t j = 0; j < whole_vectors(count); j += W, token += static_cast<Index>(kVectorTokens<A>)) {
            const Vector<Index> seen = (token < prefix) | ((token >= begin) & (token < end)) | (token == own);
            store_vector(s + j, seen ? load_vector(s + j) : all_masked);
        }
    }

    // 1 for units that see no key, whose sum of probabilities is 0.
    Vector<A> fully_masked(int64_t group) const {
        Vector<A> x{};
        if (masked_ || variant_.row().keys == 0)
            for (int64_t lane = 0; lane < W; ++lane)
                if (variant_.row().keys == 0 || ranges_[query_of(group * G + lane % G)].fully_masked()) x[lane] = 1;
        return x;
    }

    // The largest number of each lane. NaNs are skipped: they show in the sum of the exponentials, and in `nans`.
    static Vector<A> max_by_lane(const A* s, int64_t count, Vector<Index>& nans) {
        Vector<A> largest = Vector<A>{} + kMasked;
        for (int64_t j = 0; j < whole_vectors(count); j += W) {
            const Vector<A> x = load_vector(s + j);
            largest = Max{}(x, largest);
            nans |= x != x;
        }
        return largest;
    }

    // s becomes 2^-headroom e^(scale (s - base)); returns their sums by lane. A row_max of -inf is replaced by 0, so
    // that all exponentials are 0.
    static Vector<A> base_of(Vector<A> row_max) { return row_max == kMasked ? Vector<A>{} : row_max; }
    Vector<A> exponential_at(A* s, Vector<A> base) const {
        const Vector<A> prob = power_of_two((load_vector(s) - base) * exponent_scale_, headroom_);
        store_vector(s, prob);
        return prob;
    }

    // Calls `each(lane, query, heads_on)` for the units of a group: a query under a head that lies so many key/value
    // heads behind the first one.
    template <typename Each>
    void for_group(int64_t group, Each&& each) const {
        for (int64_t lane = 0; lane < min(G, units_.count() - group * G); ++lane) {
            const int64_t unit = group * G + lane;
            each(lane, unit / units_.heads, unit % units_.heads * variant_.row().q_per_kv);
        }
    }
    // The units' sinks, in each 128-bit part; -inf without.
    Vector<A> sinks(int64_t group) const {
        Vector<A> sinks = Vector<A>{} + kMasked;
        if (variant_.has_sinks())
            for_group(group, [&](int64_t lane, int64_t query, int64_t heads_on) {
                for (int64_t token = 0; token < W; token += G) sinks[token + lane] = variant_.sink(query, heads_on);
            });
        return sinks;
    }
    // Sums by lane before the first key: a sink's share lies in the first token's lane.
    Vector<A> sum_of_sinks() const {
        Vector<A> sums{};
        if (variant_.has_sinks())
            for (int64_t lane = 0; lane < G; ++lane) sums[lane] = exp2_of<A>(-headroom_);
        return sums;
    }

    // One more block of a softmax.
    void online_softmax(int64_t group, int64_t count, A* s) {
        const bool is_first = blocks_ == 1;
        Vector<Index> nans = is_first ? Vector<Index>{} : nans_[group];
        const Vector<A> before = is_first ? sinks(group) : row_max_[group];
        const Vector<A> sum_before = is_first ? sum_of_sinks() : row_sum_[group];
        const Vector<A> row_max = Max{}(reduce_tokens<A>(max_by_lane(s, count, nans), Max{}), before);
        const Vector<A> base = base_of(row_max);
        Vector<A> sums{};
        for (int64_t j = 0; j < whole_vectors(count); j += W) sums += exponential_at(s + j, base);
        if (!is_first || variant_.has_sinks()) {
            const Vector<A> factor = power_of_two((before - base) * exponent_scale_, 0);
            store_group(factors_, group, factor);
            sums += sum_before * factor;
        }
        row_max_[group] = row_max;
        row_sum_[group] = sums;
        nans_[group] = nans;
    }

    Vector<A> with_nans(int64_t group) const {
        const Vector<A> one_or_zero = nans_[group] ? Vector<A>{} + A(1) : Vector<A>{};
        const Vector<A> any = reduce_tokens<A>(one_or_zero, Plus{});
        return any > A(0) ? Vector<A>{} + static_cast<A>(__builtin_nan("")) : Vector<A>{} - kMasked;
    }

    void softmax_backward(int64_t group, int64_t count, A* s, A* d_probs) const {
        Vector<Index> nans{};
        const Vector<A> sink = sinks(group), largest = reduce_tokens<A>(max_by_lane(s, count, nans), Max{});
        const Vector<A> row_max = variant_.has_sinks() ? Max{}(sink, largest) : largest, base = base_of(row_max);
        Vector<A> sums{}, dots{};
        for (int64_t j = 0; j < whole_vectors(count); j += W) {
            const Vector<A> prob = exponential_at(s + j, base);
            sums += prob;
            dots += prob * load_vector(d_probs + j);
        }
        const Vector<A> masked = row_max == kMasked ? fully_masked(group) : Vector<A>{};
        const Vector<A> sink_prob = power_of_two((sink - base) * exponent_scale_, headroom_);
        Vector<A> row_sum = reduce_tokens<A>(sums, Plus{}) + masked;
        if (variant_.has_sinks()) row_sum += sink_prob;
        const Vector<A> inv_row_sum = A(1) / row_sum;
        Vector<A> delta = reduce_tokens<A>(dots, Plus{}) / row_sum;
        if (variant_.has_sinks())
            for_group(group, [&](int64_t lane, int64_t query, int64_t heads_on) {
                variant_.add_grad_sink(query, sink_prob[lane] * inv_row_sum[lane], delta[lane], heads_on);
            });
        if (p_.grad_lse.given) add_grad_lse(group, count, d_probs, delta);
        for (int64_t j = 0; j < whole_vectors(count); j += W) {
            const Vector<A> prob = load_vector(s + j) * inv_row_sum;
            store_vector(s + j, prob);
            store_vector(d_probs + j, prob * (load_vector(d_probs + j) - delta) * scale_);
        }
    }

    // As `ScoreVariant::add_grad_lse`.
    void add_grad_lse(int64_t group, int64_t count, A* d_probs, Vector<A>& delta) const {
        Vector<A> grad;
        for (int64_t lane = 0; lane < W; ++lane) {
            const int64_t unit = min(group * G + lane % G, units_.count() - 1), query = query_of(unit);
            grad[lane] = variant_.grad_lse(query, masked_ ? ranges_[query] : KeyRange{0, 0, count, -1},
                                           unit % units_.heads * variant_.row().q_per_kv);
        }
        for (int64_t j = 0; j < whole_vectors(count); j += W)
            store_vector(d_probs + j, load_vector(d_probs + j) - delta + grad);
        delta = Vector<A>{};
    }

    const AttentionProblem& p_;
    const ScoreVariant<T>& variant_;
    const Units& units_;
    A scale_, exponent_scale_;
    int headroom_;
    int64_t groups_, blocks_ = 0;
    bool masked_;
    KeyRange ranges_[kFewQueries];
    Vector<A> row_max_[kFewUnits / G], row_sum_[kFewUnits / G];
    Vector<Index> nans_[kFewUnits / G];
    A factors_[kFewUnits], inv_row_sum_[kFewUnits], lse_[kFewUnits];
};

INTERFORMER_ISA_END
