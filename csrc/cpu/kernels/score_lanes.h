// Scores with queries in lanes: a tile of queries is masked by the ranges of score_variant.h and mapped to
// probabilities. Keys are taken in blocks, [key, N vectors of queries], with an online softmax over the blocks.
#pragma once

#include "cpu/kernels/score_bias.h"
#include "cpu/kernels/score_variant.h"

INTERFORMER_ISA_BEGIN

template <typename T, int N>
class ScoreLanes {
  public:
    using A = Acc<T>;
    using X = Operand<T>;
    static constexpr int64_t W = kLanes<A>, kQueries = N * W;

    // Queries [r, r + count); further lanes repeat the last one.
    ScoreLanes(const ScoreVariant<T>& variant, int64_t r, int64_t count, const LaneBias<A>* bias = nullptr)
        : variant_(variant),
          bias_(bias),
          first_query_(r),
          queries_(count),
          masks_(variant.has_masks() || variant.row().keys == 0),
          scale_(variant.score_scale()) {
        for (int n = 0; n < N; ++n) {
            row_max_[n] = Vector<A>{} - kInfinity;
            row_sum_[n] = Vector<A>{};
        }
        if (masks_) find_ranges(r, count);
        if (variant_.has_sinks()) begin_with_sinks(r, count);
        if (variant_.dropout().some) begin_dropout(r, count);
    }

    // The columns that at least one of the queries sees, rounded outwards to panels and vectors.
    ColumnRanges columns() const { return masks_ ? columns_ : variant_.all_columns(); }

    // The scores of keys [j, j + count) become probabilities, as operands of sums over keys, in their place. Returns
    // whether the sums over earlier keys are to be multiplied by `rescale`.
    bool scores_to_probs(int64_t j, int64_t count, A* scores) {
        if (variant_.adjusts()) variant_.adjust(scores, count * kQueries);
        if (bias_) bias_->template add<N>(first_query_, queries_, j, count, scores);
        bool rescales = false;
        if (variant_.is_softmax()) {
            mask(j, count, scores, -kInfinity);
            rescales = softmax(count, scores);
        } else {
            variant_.map(scores, count * kQueries);
            mask(j, count, scores, A(0));
            pair_keys(count, scores);
        }
        if (variant_.dropout().some) drop(j, count, scores);
        if (variant_.dropout().all) fill(scores, operands<X>(count) * kQueries, A(0));
        return rescales;
    }
    const A* rescale() const { return rescale_; }

    // After the last block: the factor of each query's sums, and its log-sum-exp.
    void inv_row_sums(A* to) {
        for (int n = 0; n < N; ++n) {
            // A query that sees no key, and has no sink, or one of -inf.
            if (masks_) row_sum_[n] += row_max_[n] == -kInfinity ? load_vector(fully_masked_ + n * W) : Vector<A>{};
            store_vector(to + n * W, A(1) / row_sum_[n]);
        }
    }
    void lse(A* to) const {
        const A headroom = exp2_of<A>(variant_.headroom());
        for (int n = 0; n < N; ++n) {
            const Vector<A> row_max = row_max_[n] * scale_;
            const Vector<A> lse = row_max + logarithm(row_sum_[n] * headroom);
            store_vector(to + n * W, row_max == kInfinity ? row_max : lse);
        }
    }

  private:
    using Index = typename IndexOf<A>::type;
    static constexpr A kInfinity = __builtin_inf();

    void find_ranges(int64_t r, int64_t count) {
        VisibleKeys visible(variant_.row().keys);
        KeyRange range{};
        for (int64_t i = 0; i < kQueries; ++i) {
            if (i < count) visible.include(range = variant_.key_range(r + i));
            prefix_[i] = range.prefix;
            first_[i] = range.first;
            last_[i] = range.last;
            own_[i] = range.own;
            fully_masked_[i] = range.fully_masked() ? A(1) : A(0);
            all_prefix_ = min(all_prefix_, range.prefix);
            all_first_ = max(all_first_, range.first);
            all_last_ = min(all_last_, range.last);
        }
        columns_ = visible.template columns<A>();
    }

    // Whether all queries see all of these keys.
    bool visible_to_all(int64_t begin, int64_t end) const {
        return end <= all_prefix_ || (begin >= all_first_ && end <= all_last_);
    }

    // Sets scores that their query does not see to `masked`.
    void mask(int64_t j, int64_t count, A* scores, A masked) const {
        if (!masks_ || visible_to_all(j, j + count)) return;
        Vector<Index> prefix[N], first[N], last[N], own[N];
        for (int n = 0; n < N; ++n) {
            prefix[n] = relative(prefix_ + n * W, j, count);
            first[n] = relative(first_ + n * W, j, count);
            last[n] = relative(last_ + n * W, j, count);
            own[n] = variant_.row().targets > 0 ? relative(own_ + n * W, j, count, -1) : Vector<Index>{} - 1;
        }
        const Vector<A> all_masked = Vector<A>{} + masked;
        for (int64_t k = 0; k < count; ++k) {
            if (visible_to_all(j + k, j + k + 1)) continue;
            const Vector<Index> key = Vector<Index>{} + static_cast<Index>(k);
            for (int n = 0; n < N; ++n) {
                A* s = scores + k * kQueries + n * W;
                const auto visible = (key < prefix[n]) | ((key >= first[n]) & (key < last[n])) | (key == own[n]);
                store_vector(s, visible ? load_vector(s) : all_masked);
            }
        }
    }
    // Bounds of keys, counted from key j on and clamped to [least, count].
    static Vector<Index> relative(const int64_t* bounds, int64_t j, int64_t count, int64_t least = 0) {
        Index to[W];
        for (int64_t i = 0; i < W; ++i) to[i] = static_cast<Index>(min(max(bounds[i] - j, least), count));
        return load_vector(to);
    }

    // Queries of a tile, of which the last one is repeated.
    void begin_with_sinks(int64_t r, int64_t count) {
        for (int n = 0; n < N; ++n) {
            for (int64_t lane = 0; lane < W; ++lane)
                row_max_[n][lane] = variant_.sink(r + min(n * W + lane, count - 1));
            row_sum_[n] = Vector<A>{} + exp2_of<A>(-variant_.headroom());
        }
    }
    void begin_dropout(int64_t r, int64_t count) {
        const Philox philox(variant_.dropout());
        for (int n = 0; n < N; ++n) {
            const auto query = [&](int64_t lane) { return r + min(n * W + lane, count - 1); };
            dropout_[n].set(
                philox, [&](int64_t lane) { return variant_.query_number(query(lane)); },
                [&](int64_t lane) { return variant_.row().head(query(lane)); });
        }
    }

    // Probabilities of dropped weights become 0: operands of them, bit by bit.
    void drop(int64_t j, int64_t count, A* probs) const {
        using Bits = WordsOf<A>;
        const Philox philox(variant_.dropout());
        const Bits below = Bits{} + variant_.dropout().below;
        const int64_t first = j + variant_.dropout().skipped;
        for (int64_t block = first / 4; 4 * block < first + count; ++block)
            for (int n = 0; n < N; ++n) {
                Bits words[4];
                dropout_[n].words(philox, block, words);
                for (int64_t i = 0, k = 4 * block - first; i < 4; ++i, ++k) {
                    if (k < 0 || k >= count) continue;
                    A* prob = probs + k / kNumbers<X> * kQueries + n * W;
                    Bits bits;
                    std::memcpy(&bits, prob, sizeof bits);
                    // The first number of a pair lies in the low half.
                    const Bits gone = Bits{} + (kNumbers<X> == 1 ? Bits{}[0]
                                                : k % 2 == 0     ? ~Bits{}[0] << 16
                                                                 : ~Bits{}[0] >> 16);
                    bits = words[i] >= below ? bits : bits & gone;
                    std::memcpy(prob, &bits, sizeof bits);
                }
            }
    }

    bool softmax(int64_t count, A* scores) {
        Vector<A> base[N];
        bool rescales = false;
        new_maxima(count, scores, base);
        for (int n = 0; n < N; ++n) {
            // A maximum of -inf is replaced by 0, so that all exponentials are 0. A fully masked query then gets sum 1;
            // a query whose scores are all -inf keeps sum 0, and its output is NaN, as in PyTorch.
            const Vector<A> before = row_max_[n], after = base[n];
            row_max_[n] = after;
            base[n] = after == -kInfinity ? Vector<A>{} : after;
            rescales |= any<A>(before != after);
            const Vector<A> factor = power_of_two((before - base[n]) * (scale_ * kLog2OfE), 0);
            store_vector(rescale_ + n * W, factor);
            row_sum_[n] *= factor;
        }
        exponentials(count, scores, base);
        return rescales;
    }

    // Scores become 2^-headroom e^(score_scale (s - base)), as operands, and are summed.
    void exponentials(int64_t count, A* scores, const Vector<A>* base) {
        const PowerOfTwo<A> power(variant_.headroom());
        const Vector<A> scale = Vector<A>{} + scale_ * kLog2OfE;
        Vector<A> sum[N] = {};
        int64_t k = 0;
        for (; k + kNumbers<X> <= count; k += kNumbers<X>)
#pragma GCC unroll 2
            for (int n = 0; n < N; ++n) {
                A* s = scores + k * kQueries + n * W;
                const Vector<A> prob = power((load_vector(s) - base[n]) * scale);
                sum[n] += prob;
                if constexpr (kNumbers<X> == 1) {
                    store_vector(s, prob);
                } else {
                    const Vector<A> next = power((load_vector(s + kQueries) - base[n]) * scale);
                    sum[n] += next;
                    store_pairs(prob, next, scores + k / 2 * kQueries + n * W);
                }
            }
        for (int n = 0; k < count && n < N; ++n) {  // a last key without a partner
            const Vector<A> prob = power((load_vector(scores + k * kQueries + n * W) - base[n]) * scale);
            sum[n] += prob;
            store_pairs(prob, Vector<A>{}, scores + k / 2 * kQueries + n * W);
        }
        for (int n = 0; n < N; ++n) row_sum_[n] += sum[n];
    }

    // The largest scores up to these keys. NaNs are skipped: they show in the sum of the exponentials. Where the
    // largest score is +inf, the sum is NaN and cannot show a NaN score. There the maximum becomes that NaN, and stays.
    void new_maxima(int64_t count, const A* scores, Vector<A>* to) const {
        for (int n = 0; n < N; ++n) {
            Vector<A> even = Vector<A>{} - kInfinity, odd = even;
            int64_t k = 0;
            for (; k + 1 < count; k += 2) {
                even = Max{}(load_vector(scores + k * kQueries + n * W), even);
                odd = Max{}(load_vector(scores + (k + 1) * kQueries + n * W), odd);
            }
            if (k < count) even = Max{}(load_vector(scores + k * kQueries + n * W), even);
            to[n] = Max{}(Max{}(even, odd), row_max_[n]);
            if (any<A>(to[n] == kInfinity)) {
                Vector<A> with_nans = row_max_[n] != kInfinity && row_sum_[n] != row_sum_[n] ? row_sum_[n] : to[n];
                for (k = 0; k < count; ++k) {
                    const Vector<A> s = load_vector(scores + k * kQueries + n * W);
                    with_nans = s != s ? s : with_nans;
                }
                to[n] = to[n] == kInfinity ? with_nans : to[n];
            }
        }
    }

    static void pair_keys(int64_t count, A* scores) {
        if constexpr (kNumbers<X> > 1)
            for (int64_t k = 0; k < count; k += 2)
                for (int n = 0; n < N; ++n) {
                    const A* s = scores + k * kQueries + n * W;
                    const Vector<A> next = k + 1 < count ? load_vector(s + kQueries) : Vector<A>{};
                    store_pairs(load_vector(s), next, scores + k / 2 * kQueries + n * W);
                }
    }
    static void store_pairs(Vector<A> first, Vector<A> second, A* to) {
        if constexpr (kNumbers<X> > 1) {
            const Vector<X> words = rounded_pairs(first, second);
            std::memcpy(to, &words, sizeof words);
        }
    }

    static constexpr A kLog2OfE = 1.44269504088896340736;

    const ScoreVariant<T>& variant_;
    const LaneBias<A>* bias_;
    const int64_t first_query_, queries_;
    const bool masks_;
    const A scale_;
    Vector<A> row_max_[N], row_sum_[N];
    A rescale_[kQueries];
    QueryDropout<A> dropout_[N];
    // Where there are masks: the keys that each query sees, and bounds of those that all see.
    int64_t prefix_[kQueries], first_[kQueries], last_[kQueries], own_[kQueries];
    A fully_masked_[kQueries];
    int64_t all_prefix_ = INT64_MAX, all_first_ = 0, all_last_ = INT64_MAX;
    ColumnRanges columns_;
};

INTERFORMER_ISA_END
