// Masks of attention's scores, and their map to probabilities in the backward of many queries. score_lanes.h and
// few_query_scores.h map them in the forward, by the masks and factors defined here. All scores of a block of queries
// lie in memory between the product and the map, so an option of scores is one more pass over the block in each of the
// three: a softcap or a bias before the map, dropout after it.
#pragma once

#include "cpu/kernels/activations.h"
#include "cpu/kernels/key_range.h"
#include "cpu/kernels/memory.h"
#include "cpu/kernels/philox.h"
#include "cpu/kernels/score_bias.h"

INTERFORMER_ISA_BEGIN

// Softmax statistics, one number for each query of a block, padded to whole vectors: the sum of the
// probabilities before they are normalised; delta, the mean of their gradients; and the probability of the sink, before
// it is normalised. `slopes` has a number for each score: the derivative of a capped score by the product.
template <typename A>
struct RowStats {
    A *row_sum, *delta, *sink;
    A* slopes;
    KeyBias<A>* bias;  // null: none

    RowStats from(int64_t i) const { return {row_sum + i, delta + i, sink + i, slopes, bias}; }
    // Those of query `i` of a block, which lie like its scores; null without.
    A* slopes_of(int64_t i, const Matrix<A>& scores) const { return slopes ? slopes + i * scores.stride : nullptr; }
};

// The scores of a row under one key/value head. The scores of query `r` are numbers of the matrix that a method is
// given. A column is a key of the row; those outside the ranges are neither read nor written. A column of the ranges
// that its query does not see gets probability and gradient 0.
template <typename T>
class ScoreVariant {
  public:
    using A = Acc<T>;

    INTERFORMER_INLINE ScoreVariant(const AttentionProblem& problem, const RowOfHead& row) : p_(problem), row_(row) {}

    const RowOfHead& row() const { return row_; }
    bool has_masks() const { return INTERFORMER_ISA::has_masks(p_.variant, row_); }

    bool is_softmax() const { return p_.variant.score.softmax; }

    KeyRange key_range(int64_t r) const {
        if (!has_masks()) return {0, 0, row_.keys, -1};
        return key_range_of(p_.variant, row_, row_.token(r));
    }

    // The columns that at least one of the queries [r, r + count) sees, rounded outwards to panels and vectors.
    ColumnRanges column_ranges(int64_t r, int64_t count) const {
        if (!has_masks()) return all_columns();
        VisibleKeys visible(row_.keys);
        for (int64_t i = r; i < r + count; i += row_.q_per_kv) visible.include(key_range(i));
        visible.include(key_range(r + count - 1));
        return visible.columns<A>();
    }

    ColumnRanges all_columns() const { return {{{0, round_up(row_.keys, kLanes<A>)}}, row_.keys > 0 ? 1 : 0}; }

    // Products of queries and keys are scaled here, after the product. The sign of the scale, and a scale of 0, go into
    // the queries (`query_sign`), since a factor of 0 would turn a masked score of -inf into NaN.
    A product_scale() const {
        const double scale = p_.variant.scale;
        return scale == 0 ? A(1) : static_cast<A>(scale < 0 ? -scale : scale);
    }
    // The factor that the map is left with.
    A score_scale() const { return p_.adjusts_scores ? A(1) : product_scale(); }

    A query_sign() const { return p_.variant.scale < 0 ? A(-1) : p_.variant.scale == 0 ? A(0) : A(1); }

    // The probabilities of a softmax are 2^-headroom where the score is the largest. Then their sum over two or more
    // keys is at most 1/2, and no sum of values weighted by them exceeds the values. A sink counts as a key.
    int headroom() const {
        const int64_t terms = row_.keys + (p_.sinks ? 1 : 0);
        return terms < 2 ? 0 : 65 - __builtin_clzll(static_cast<uint64_t>(terms - 1));
    }

    bool has_sinks() const { return p_.sinks != nullptr; }
    // The sink of a query under its head, or `heads_on` further ones.
    A sink(int64_t r, int64_t heads_on = 0) const { return static_cast<const A*>(p_.sinks)[row_.head(r) + heads_on]; }

    // Products become scores: `count` numbers, whole vectors of them.
    void adjust(A* scores, int64_t count) const {
        const A scale = product_scale();
        if (p_.variant.softcap == 0) {
            for (int64_t i = 0; i < count; ++i) scores[i] *= scale;
            return;
        }
        const A cap = static_cast<A>(p_.variant.softcap), inner = static_cast<A>(scale / p_.variant.softcap);
        for (int64_t i = 0; i < count; i += kLanes<A>)
            store_vector(scores + i, cap * hyperbolic_tangent(load_vector(scores + i) * inner));
    }
    // The same under a softcap, with the derivative of each score by its product.
    void adjust(A* scores, int64_t count, A* slopes) const {
        const A scale = product_scale();
        const A cap = static_cast<A>(p_.variant.softcap), inner = static_cast<A>(scale / p_.variant.softcap);
        for (int64_t i = 0; i < count; i += kLanes<A>) {
            const Vector<A> tangent = hyperbolic_tangent(load_vector(scores + i) * inner);
            store_vector(scores + i, cap * tangent);
            store_vector(slopes + i, scale * (A(1) - tangent * tangent));
        }
    }
    bool adjusts() const { return p_.adjusts_scores; }
    bool caps() const { return p_.variant.softcap > 0; }

    const Dropout& dropout() const { return p_.dropout; }
    // The number of a query among those of the call, as dropout counts them.
    int64_t query_number(int64_t r) const {
        return row_.token(r) + (p_.query_begins ? p_.query_begins[row_.index] : row_.index * p_.queries);
    }

    // Pointwise: `count` scores become probabilities.
    void map(A* scores, int64_t count) const {
        activate(p_.variant.score.activation, scores, count, score_scale(), static_cast<A>(p_.weight_scale));
    }

    // Backward: the scores become normalised probabilities, and the gradients of the probabilities become those of the
    // products of queries and keys. The factor of probabilities is left out: the gradients contain it.
    void scores_to_probs_and_d_scores(int64_t r, int64_t count, Matrix<A> scores, Matrix<A> d_probs,
                                      const ColumnRanges& ranges, const RowStats<A>& stats) const {
        const bool softmax = p_.variant.score.softmax, drops = p_.dropout.some || p_.dropout.all;
        if (p_.adjusts_scores)
            for (int64_t i = 0; i < count; ++i) adjust_row(scores.from(i).data, stats.slopes_of(i, scores), ranges);
        if (stats.bias) {
            stats.bias->begin_block(r, count, ranges);
            for (int64_t i = 0; i < count; ++i) stats.bias->add(r + i, ranges, scores.from(i).data);
        }
        if (softmax) this->softmax(r, count, scores, ranges, stats, d_probs.data);
        for (int64_t i = 0; i < count; ++i) {
            A *s = scores.from(i).data, *d = d_probs.from(i).data;
            if (softmax) {
                softmax_backward(r + i, s, d, ranges, stats.from(i));
            } else {
                pointwise_backward(r + i, s, d, ranges);
                if (drops) drop(r + i, s, d, ranges);
            }
            if (stats.bias) {  // keys that the query does not see have gradients of 0, or NaN
                mask_out(d, key_range(r + i), ranges, A(0));
                stats.bias->add_gradients(r + i, ranges, d);
            }
            if (p_.adjusts_scores) products_backward(d, stats.slopes_of(i, scores), ranges);
        }
    }

    // The gradient of the log-sum-exp of a query under its head, or `heads_on` further ones; 0 where the query sees no
    // key, whatever is given there.
    A grad_lse(int64_t r, const KeyRange& range, int64_t heads_on = 0) const {
        if (range.fully_masked()) return 0;
        return *address<const A>(p_.grad_lse, row_.index, row_.token(r), row_.head(r) + heads_on);
    }

    // The gradient of a sink under one query. Its probability has no value, so its gradient is that of the log-sum-exp
    // alone; a query that sees no key has the sink as its log-sum-exp.
    void add_grad_sink(int64_t r, A prob, A delta, int64_t heads_on = 0) const {
        const int64_t head = row_.head(r) + heads_on;
        const A grad =
            p_.grad_lse.given ? *address<const A>(p_.grad_lse, row_.index, row_.token(r), head) - delta : -delta;
        p_.grad_sinks[p_.row_groups[row_.index] * p_.heads + head] += static_cast<double>(prob * grad);
    }

  private:
    void pointwise_backward(int64_t r, A* scores, A* d_probs, const ColumnRanges& ranges) const {
        for (int i = 0; i < ranges.n; ++i)
            activate_with_grads(p_.variant.score.activation, scores + ranges.r[i].begin, d_probs + ranges.r[i].begin,
                                ranges.r[i].end - ranges.r[i].begin, score_scale());
        const KeyRange range = key_range(r);
        mask_out(scores, range, ranges, A(0));
        mask_out(d_probs, range, ranges, A(0));
    }

    // Subtracts delta from the gradients of a query's probabilities, which sets it to 0, and adds the log-sum-exp's.
    // The difference of one key is exactly 0: delta less the log-sum-exp's would round.
    void add_grad_lse(int64_t r, A* d_probs, const ColumnRanges& ranges, A& delta) const {
        const A grad = grad_lse(r, key_range(r));
        for (int i = 0; i < ranges.n; ++i)
            for (int64_t j = ranges.r[i].begin; j < ranges.r[i].end; ++j) d_probs[j] = d_probs[j] - delta + grad;
        delta = 0;
    }

    void softmax_backward(int64_t r, A* probs, A* d_probs, const ColumnRanges& ranges, const RowStats<A>& stats) const {
        const bool drops = p_.dropout.some || p_.dropout.all;
        const A inv_row_sum = A(1) / *stats.row_sum;
        if (p_.sinks) add_grad_sink(r, *stats.sink * inv_row_sum, *stats.delta);
        if (p_.grad_lse.given) add_grad_lse(r, d_probs, ranges, *stats.delta);
        const A delta = *stats.delta, scale = score_scale();
        for (int i = 0; i < ranges.n; ++i) {
            const Columns columns = ranges.r[i];
            if (drops) {
                softmax_backward_of_kept(probs, d_probs, columns, inv_row_sum, delta, scale,
                                         static_cast<A>(p_.dropout.factor));
                continue;
            }
            for (int64_t j = columns.begin; j < columns.end; ++j) {
                probs[j] *= inv_row_sum;
                d_probs[j] = probs[j] * (d_probs[j] - delta) * scale;
            }
        }
    }
    // The same where the probabilities of dropped weights have a negative sign. They become 0, and others get the
    // factor of kept weights: the output's gradients would overflow with it.
    static void softmax_backward_of_kept(A* probs, A* d_probs, Columns columns, A inv_row_sum, A delta, A scale,
                                         A factor) {
        for (int64_t j = columns.begin; j < columns.end; j += kLanes<A>) {
            const Vector<A> signed_prob = load_vector(probs + j);
            const auto kept = (Vector<typename IndexOf<A>::type>)signed_prob >= 0;
            const Vector<A> prob = (kept ? signed_prob : -signed_prob) * inv_row_sum;
            store_vector(probs + j, prob * (kept ? Vector<A>{} + factor : Vector<A>{}));
            store_vector(d_probs + j, prob * (load_vector(d_probs + j) - delta) * scale);
        }
    }

    void adjust_row(A* scores, A* slopes, const ColumnRanges& ranges) const {
        for (int i = 0; i < ranges.n; ++i) {
            const int64_t begin = ranges.r[i].begin, count = ranges.r[i].end - begin;
            if (slopes)
                adjust(scores + begin, count, slopes + begin);
            else
                adjust(scores + begin, count);
        }
    }
    // From the gradients of a query's scores to those of its products.
    void products_backward(A* d_scores, const A* slopes, const ColumnRanges& ranges) const {
        const A scale = product_scale();
        for (int i = 0; i < ranges.n; ++i)
            for (int64_t j = ranges.r[i].begin; j < ranges.r[i].end; ++j) d_scores[j] *= slopes ? slopes[j] : scale;
    }

    // Pointwise: weights, and their gradients, get the factor of kept weights; those of dropped keys become 0.
    void drop(int64_t r, A* probs, A* d_probs, const ColumnRanges& ranges) const {
        const Vector<A> left = Vector<A>{} + static_cast<A>(p_.dropout.factor);
        for_kept(r, ranges, [&](int64_t j, auto kept) {
            const Vector<A> factor = kept ? left : Vector<A>{};
            store_vector(probs + j, load_vector(probs + j) * factor);
            store_vector(d_probs + j, load_vector(d_probs + j) * factor);
        });
    }
    // Calls `each(j, kept)` for the vectors of columns of the ranges: whether the weights of these keys are kept.
    template <typename Each>
    INTERFORMER_INLINE void for_kept(int64_t r, const ColumnRanges& ranges, Each&& each) const {
        const Philox philox(p_.dropout);
        KeyDropout keys(philox, query_number(r), row_.head(r));
        const WordsOf<A> below = WordsOf<A>{} + p_.dropout.below;
        for (int i = 0; i < ranges.n; ++i)
            for (int64_t j = ranges.r[i].begin; j < ranges.r[i].end; j += KeyDropout::kMaxKeys) {
                const int64_t count = min(KeyDropout::kMaxKeys, ranges.r[i].end - j);
                if (p_.dropout.all) {
                    for (int64_t k = 0; k < count; k += kLanes<A>) each(j + k, below > below);
                    continue;
                }
                const uint32_t* words = keys.words(j + p_.dropout.skipped, count);
                for (int64_t k = 0; k < count; k += kLanes<A>) each(j + k, load_words<A>(words + k) >= below);
            }
    }

    // Sets the columns that the query does not see to `masked`.
    static void mask_out(A* s, const KeyRange& range, const ColumnRanges& ranges, A masked) {
        for (int i = 0; i < ranges.n; ++i) {
            const Columns columns = ranges.r[i];
            mask_out(s, max(columns.begin, range.prefix), min(range.first, columns.end), masked);
            const int64_t behind = max(max(range.last, range.prefix), columns.begin);
            if (range.own < 0) {
                mask_out(s, behind, columns.end, masked);
            } else {
                mask_out(s, behind, min(range.own, columns.end), masked);
                mask_out(s, max(range.own + 1, columns.begin), columns.end, masked);
            }
        }
    }

    // Columns [begin, end). They are written by whole vectors, since a vector load soon after a narrower store of the
    // same bytes stalls.
    static void mask_out(A* s, int64_t begin, int64_t end, A masked) {
        constexpr int64_t W = kLanes<A>;
        using Index = typename IndexOf<A>::type;
        Vector<Index> lanes;
#pragma GCC unroll 16
        for (int lane = 0; lane < W; ++lane) lanes[lane] = lane;
        for (int64_t j = begin / W * W; j < end; j += W) {
            const Index from = static_cast<Index>(max(begin - j, 0)), to = static_cast<Index>(min(end - j, W));
            const Vector<A> x = load_vector(s + j), all_masked = Vector<A>{} + masked;
            store_vector(s + j, ((lanes >= from) & (lanes < to)) ? all_masked : x);
        }
    }

    void softmax(int64_t r, int64_t count, Matrix<A> scores, const ColumnRanges& ranges, const RowStats<A>& stats,
                 A* d_probs) const {
        for (int64_t i = 0; i < count; i += kLanes<A>)
            softmax_of_vector(r + i, min(kLanes<A>, count - i), scores.from(i), ranges, stats.from(i),
                              d_probs + i * scores.stride);
    }

    // Masks the scores of up to a vector of queries and takes their exponentials. The statistics of the queries are
    // reduced together, one query a lane. `delta` is computed on the way.
    void softmax_of_vector(int64_t r, int64_t count, Matrix<A> scores, const ColumnRanges& ranges,
                           const RowStats<A>& stats, A* d_probs) const {
        constexpr A kMasked = -__builtin_inf();
        Vector<A> per_query[kLanes<A>], dots[kLanes<A>];
        A base[kLanes<A>], fully_masked[kLanes<A>] = {};
        for (int64_t i = 0; i < count; ++i) {
            const KeyRange range = key_range(r + i);
            fully_masked[i] = range.fully_masked() ? A(1) : A(0);
            mask_out(scores.from(i).data, range, ranges, kMasked);
            per_query[i] = max_by_lane(scores.from(i).data, ranges);
        }
        Vector<A> row_max = reduce_first<A>(per_query, count, Max{});
        A sinks[kLanes<A>] = {};
        if (p_.sinks) {
            for (int64_t i = 0; i < count; ++i) sinks[i] = sink(r + i);
            row_max = Max{}(load_vector(sinks), row_max);
        }
        // A row_max of -inf is replaced by 0, so that all exponentials are 0. A fully masked query then has sum 1 and
        // delta 0; a query whose scores are all -inf has sum 0 and delta NaN, as in PyTorch. A sink of -inf is none.
        store_vector(base, row_max == kMasked ? Vector<A>{} : row_max);
        const bool drops = p_.dropout.some || p_.dropout.all;
        for (int64_t i = 0; i < count; ++i) {
            A *s = scores.from(i).data, *d = d_probs + i * scores.stride;
            if (drops)
                exponentials_of_kept(r + i, s, d, ranges, base[i], per_query[i], dots[i]);
            else
                exponentials(s, d, ranges, base[i], per_query[i], dots[i]);
        }
        const Vector<A> masked = row_max == kMasked ? load_vector(fully_masked) : Vector<A>{};
        Vector<A> row_sum = reduce_first<A>(per_query, count, Plus{}) + masked;
        if (p_.sinks) {
            constexpr A kLog2OfE = 1.44269504088896340736;
            const Vector<A> prob = power_of_two((load_vector(sinks) - load_vector(base)) * kLog2OfE, headroom());
            store_vector(stats.sink, prob);
            row_sum += prob;
        }
        store_vector(stats.row_sum, row_sum);
        store_vector(stats.delta, reduce_first<A>(dots, count, Plus{}) / row_sum);
    }

    // The largest number of each lane. NaNs are skipped: they show in the sum of the exponentials.
    static Vector<A> max_by_lane(const A* x, const ColumnRanges& ranges) {
        Vector<A> largest = Vector<A>{} - static_cast<A>(__builtin_inf());
        for (int i = 0; i < ranges.n; ++i)
            for (int64_t j = ranges.r[i].begin; j < ranges.r[i].end; j += kLanes<A>)
                largest = Max{}(load_vector(x + j), largest);
        return largest;
    }

    // s becomes 2^-headroom e^(score_scale (s - base)). Returns the sums by lane, and those of the products with
    // `d_probs`.
    void exponentials(A* s, const A* d_probs, const ColumnRanges& ranges, A base, Vector<A>& sum,
                      Vector<A>& dot) const {
        constexpr A kLog2OfE = 1.44269504088896340736;
        const A scale = score_scale() * kLog2OfE;
        const int down = headroom();
        Vector<A> sums{}, dots{};
        for (int i = 0; i < ranges.n; ++i)
            for (int64_t j = ranges.r[i].begin; j < ranges.r[i].end; j += kLanes<A>) {
                const Vector<A> prob = power_of_two((load_vector(s + j) - base) * scale, down);
                store_vector(s + j, prob);
                sums += prob;
                dots += prob * load_vector(d_probs + j);
            }
        sum = sums;
        dot = dots;
    }
    // The same under dropout. Gradients get the factor of kept weights, those of dropped ones become 0, and their
    // probabilities get a negative sign.
    void exponentials_of_kept(int64_t r, A* s, A* d_probs, const ColumnRanges& ranges, A base, Vector<A>& sum,
                              Vector<A>& dot) const {
        constexpr A kLog2OfE = 1.44269504088896340736;
        const A scale = score_scale() * kLog2OfE;
        const int down = headroom();
        const Vector<A> factor = Vector<A>{} + static_cast<A>(p_.dropout.factor);
        Vector<A> sums{}, dots{};
        for_kept(r, ranges, [&](int64_t j, auto kept) {
            const Vector<A> prob = power_of_two((load_vector(s + j) - base) * scale, down);
            const Vector<A> left = load_vector(d_probs + j) * (kept ? factor : Vector<A>{});
            store_vector(s + j, kept ? prob : -prob);
            store_vector(d_probs + j, left);
            sums += prob;
            dots += prob * left;
        });
        sum = sums;
        dot = dots;
    }

    const AttentionProblem& p_;
    const RowOfHead row_;
};

INTERFORMER_ISA_END
