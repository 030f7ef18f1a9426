// What forward and backward of the attention kernels share: one row of the batch under one key/value head.
//
// Its queries are taken in blocks; query `r` of `[0, queries * group)` is token `r / group` under head
// `kv_head * group + r % group`. Scores of a block are kept for all keys of the row at once, [block, keys], so that the
// softmax is the plain one, whatever the row's length, and the backward computes them once.
#pragma once

#include "cpu/kernels.h"
#include "cpu/kernels/attention_products.h"
#include "cpu/kernels/memory.h"
#include "cpu/kernels/rotary.h"
#include "cpu/kernels/scalar_maps.h"

INTERFORMER_LEVEL_BEGIN

// Sizes of what a thread keeps, in numbers (of type A) or operands (of type X). Rows of scores are an odd number of
// cache lines apart, so that what is read down a column does not crowd one set of the cache.
template <typename T>
struct Sizes {
    using A = Acc<T>;
    using X = Operand<T>;

    int64_t head_stride, value_stride;  // numbers between rows of channels
    int64_t group;

    explicit Sizes(const AttentionProblem& p)
        : head_stride(padded<X>(p.head_size)), value_stride(padded<X>(p.value_size)), group(p.heads / p.kv_heads) {}

    static int64_t score_stride(int64_t keys) {
        return round_up(keys, kPanel<A>) + 64 / static_cast<int64_t>(sizeof(A));
    }
    // Queries whose scores are kept at once: few enough for the second level of cache, whole tiles where possible.
    static int64_t block(int64_t queries, int64_t keys) {
        const int64_t tiles = most(kScores / score_stride(keys) / kTileRows, 1);
        return most(1, least(queries, least(tiles, kMostTiles) * kTileRows));
    }
    // Queries of a part of a row, in whole blocks. The gradients of the row's keys are summed part by part, whether or
    // not parts are shared out to threads: so the bits are the same.
    static int64_t part(int64_t queries, int64_t keys) {
        const int64_t size = block(queries, keys);
        return size * most(kPart / size, 1);
    }
    // Whether some row may have more than one part.
    bool has_parts(const AttentionProblem& p) const { return p.most_queries * group > kPart / 2; }
    // Bounds of `block` and of the scores of a block over all rows of a problem.
    int64_t most_block(const AttentionProblem& p) const {
        return most(1, least(p.most_queries * group, kMostTiles * kTileRows));
    }
    int64_t most_scores(const AttentionProblem& p) const {
        const int64_t stride = score_stride(p.most_keys);
        return least(most(kScores, kTileRows * stride), most_block(p) * stride);
    }

  private:
    static constexpr int64_t kScores = (128 << 10) / sizeof(A), kMostTiles = 16, kPart = 512;
};

// The keys that one query sees: [0, prefix) and [first, last).
struct Visible {
    int64_t prefix, first, last;
};

// What became of a block's scores, one for each query, in whole vectors: the largest, scaled; the sum of the weights;
// the mean of their gradients.
template <typename A>
struct Weighed {
    A *largest, *sums, *means;
};

// Calls `each(row, kv_head)` for a task: heads of a row, whose tokens lie side by side, one after the other.
template <typename Each>
inline void for_each_row(const AttentionTask& task, Each&& each) {
    for (int64_t row = task.first_row; row < task.last_row; ++row)
        for (int64_t head = task.first_head; head < task.last_head; ++head) each(row, head);
}

template <typename T>
class AttentionRow {
  public:
    using A = Acc<T>;
    using S = Stored<T>;
    using X = Operand<T>;

    // `extra`: memory for the channels of one token.
    AttentionRow(const AttentionProblem& problem, const Sizes<T>& size, int64_t row, int64_t kv_head, A* extra)
        : p(problem),
          size_(size),
          row_(row),
          kv_head_(kv_head),
          queries_(p.query_counts ? p.query_counts[row] : p.queries),
          extra_(extra),
          keys(p.key_counts[row]),
          total(queries_ * size_.group),
          block(size_.block(total, keys)),
          part(size_.part(total, keys)),
          score_stride(size_.score_stride(keys)) {}

    int64_t parts() const { return most((total + part - 1) / part, 1); }

    // Without a division where heads are not grouped: there it would cost as much as a short row's products.
    int64_t token(int64_t r) const { return size_.group == 1 ? r : r / size_.group; }
    int64_t head(int64_t r) const { return kv_head_ * size_.group + r - token(r) * size_.group; }

    template <typename E = T>
    INTERFORMER_INLINE E* at(const RowTensor& x, int64_t r) const {
        return address<T, E>(x, row_, token(r), head(r));
    }

    T* key_at(const RowTensor& x, int64_t j) const { return address<T>(x, row_, j, kv_head_); }

    // Tokens of k or v, in place, or, those of the columns, copied; channels beyond the last are 0.
    Matrix<const S> tokens(const RowTensor& x, const ColumnRuns& columns, int64_t channels, bool rotate,
                           S* copy) const {
        const int64_t stride = padded<X>(channels);
        if constexpr (std::is_same_v<T, S>) {
            const T* first = key_at(x, 0);
            if (!rotate && stride == channels && whole_operands(first, x.token)) return {first, x.token};
        }
        for (int i = 0; i < columns.count; ++i)
            for (int64_t j = columns.runs[i].begin; j < least(columns.runs[i].end, keys); ++j) {
                S* to = copy + j * stride;
                if (rotate) {
                    widen(key_at(x, j), 1, channels, extra_);
                    turn(p.rope, key_position(j), A(1), extra_);
                    narrow(extra_, channels, to);
                } else {
                    copy_stored(key_at(x, j), 1, channels, to);
                }
                fill(to + channels, stride - channels, S{});
            }
        return {copy, stride};
    }

    // Those tokens, of as many channels as they are stored with, to be summed over.
    static Matrix<const X> tokens_along_rows(Matrix<const S> tokens, int64_t keys, const ColumnRuns& columns,
                                             int64_t channels, X* copy) {
        if constexpr (std::is_same_v<X, S>) {
            return tokens;
        } else {
            for (int i = 0; i < columns.count; ++i) {
                const int64_t begin = columns.runs[i].begin, end = least(columns.runs[i].end, keys);
                along_rows<X>(tokens.from(begin), end - begin, channels, copy + operands<X>(begin) * channels);
            }
            return {copy, channels};
        }
    }

    // Queries [r, r + count), rotated, as rows: copied, or, of few, in place. Their products with keys are yet to be
    // scaled by `score_scale`, which is positive.
    Matrix<const S> queries(int64_t r, int64_t count, S* copy) const {
        constexpr int64_t kFew = 32;  // of more the copy is denser in the cache
        const bool as_they_are = !p.rope.cos && p.scale > 0;
        if constexpr (std::is_same_v<T, S>) {
            const int64_t stride = size_.group == 1 ? p.q.token : p.q.head;
            const bool even = size_.group == 1 || p.q.token == size_.group * p.q.head;
            const T* first = at(p.q, r);
            if (total <= kFew && as_they_are && even && p.q.channel == 1 && p.head_size == size_.head_stride &&
                whole_operands(first, stride))
                return {first, stride};
        }
        S* to = copy;
        for (int64_t i = 0; i < count; ++i, to += size_.head_stride) {
            if (as_they_are) {
                copy_stored(at(p.q, r + i), p.q.channel, p.head_size, to);
            } else {
                widen(at(p.q, r + i), p.q.channel, p.head_size, extra_);
                if (p.rope.cos) turn(p.rope, query_position(r + i), A(1), extra_);
                for (int64_t c = 0; c < p.head_size; ++c) extra_[c] *= sign();
                narrow(extra_, p.head_size, to);
            }
            fill(to + p.head_size, size_.head_stride - p.head_size, S{});
        }
        return {copy, size_.head_stride};
    }
    // What queries are multiplied by, and then their scores: a scale of 0 stays with the queries, since it would make
    // NaNs of hidden scores.
    A sign() const { return p.scale < 0 ? A(-1) : p.scale == 0 ? A(0) : A(1); }
    A score_scale() const { return p.scale == 0 ? A(1) : static_cast<A>(p.scale < 0 ? -p.scale : p.scale); }

    int64_t query_position(int64_t r) const {
        return position_of(p.positions_q, p.query_begins ? p.query_begins[row_] : 0, token(r));
    }
    int64_t key_position(int64_t j) const { return position_of(p.positions_k, p.key_begins[row_], j); }

    Visible visible(int64_t r) const {
        if (!p.causal && p.window_left < 0 && p.window_right < 0) return {0, 0, keys};
        const int64_t i = token(r), at = i + keys - queries_;
        if (i < p.num_prefix) return {0, 0, keys};
        Visible seen{least(p.num_prefix, keys), 0, keys};
        if (p.causal) seen.last = least(seen.last, at + 1);
        if (p.window_left >= 0) seen.first = most(seen.first, at - p.window_left);
        if (p.window_right >= 0) seen.last = least(seen.last, at + p.window_right + 1);
        seen.last = most(seen.last, 0);
        seen.first = least(seen.first, seen.last);
        if (seen.first <= seen.prefix) {  // one run of keys
            seen.last = most(seen.last, seen.prefix);
            seen.first = 0;
            seen.prefix = 0;
        }
        return seen;
    }

    // The columns that queries [r, r + count) see: at most two runs, the prefix and the rest; returns their number.
    int columns(int64_t r, int64_t count, Columns* to) const {
        int64_t prefix = 0, first = keys, last = 0;
        for (int64_t i = r; i < r + count; i += size_.group) {
            const Visible seen = visible(i);
            prefix = most(prefix, seen.prefix);
            if (seen.first < seen.last) first = least(first, seen.first), last = most(last, seen.last);
        }
        const Visible end = visible(r + count - 1);
        if (end.first < end.last) first = least(first, end.first), last = most(last, end.last);
        int runs = 0;
        const int64_t begin = first / kPanel<A> * kPanel<A>, prefix_end = round_up(prefix, kLanes<A>);
        if (prefix > 0 && prefix_end < begin && first < last) to[runs++] = {0, prefix_end};
        const bool joined = prefix > 0 && runs == 0;
        if (first < last || joined)
            to[runs++] = {joined ? 0 : begin, most(round_up(last, kLanes<A>), joined ? prefix_end : 0)};
        return runs;
    }

    // All columns, and those that the queries of a part see: what others hold is neither read nor changed by them.
    ColumnRuns all_columns() const { return {{{0, round_up(keys, kLanes<A>)}}, keys > 0 ? 1 : 0}; }
    ColumnRuns columns_of_part(int64_t i) const {
        ColumnRuns seen;
        const int64_t first = i * part;
        seen.count = first < total ? columns(first, least(part, total - first), seen.runs) : 0;
        return seen;
    }

    // A softmax's weights are 2^-headroom where the score is the largest: so that their sum over the row's keys, where
    // there are two or more, is at most 1/2, and no sum of values under them is larger than the values.
    int headroom() const { return keys < 2 ? 0 : 65 - __builtin_clzll(static_cast<uint64_t>(keys - 1)); }

    // Scores of queries [r, r + count) over their columns become weights: 0 where a query does not see. For softmax
    // they are yet to be divided by their sum, and where `slopes` are given, their means under the weights are found on
    // the way; else they are post_scale * act(score).
    void weigh(int64_t r, int64_t count, Matrix<A> scores, const Columns* runs, int parts, const Weighed<A>& to,
               const A* slopes = nullptr) const {
        if (!p.score.softmax) {
            for (int64_t i = 0; i < count; ++i) {
                A* s = scores.from(i).data;
                for (int part = 0; part < parts; ++part)
                    activate(p.score.activation, s + runs[part].begin, runs[part].end - runs[part].begin, score_scale(),
                             static_cast<A>(p.post_scale));
                hide(s, visible(r + i), runs, parts, A(0));
                to.largest[i] = 0, to.sums[i] = 1;
            }
            return;
        }
        for (int64_t i = 0; i < count; i += kLanes<A>)
            exponentials(r + i, least(kLanes<A>, count - i), scores.from(i), runs, parts,
                         {to.largest + i, to.sums + i, to.means + i}, slopes ? slopes + i * scores.stride : nullptr);
    }

    // Scores without softmax become weights, without `post_scale`, and gradients of the weights those of the scores
    // before their scaling.
    void activate_with_gradients(int64_t r, A* s, A* grads, const Columns* runs, int count) const {
        for (int i = 0; i < count; ++i)
            activate_with_slopes(p.score.activation, s + runs[i].begin, grads + runs[i].begin,
                                 runs[i].end - runs[i].begin, score_scale());
        const Visible seen = visible(r);
        hide(s, seen, runs, count, A(0));
        hide(grads, seen, runs, count, A(0));
    }

  private:
    // Whether rows that begin at `first` and are `stride` apart begin where an operand may.
    static bool whole_operands(const T* first, int64_t stride) {
        return kNumbers<X> == 1 || (stride % kNumbers<X> == 0 && reinterpret_cast<uintptr_t>(first) % sizeof(X) == 0);
    }

    // Columns that `seen` leaves out become `hidden`.
    static void hide(A* s, const Visible& seen, const Columns* runs, int count, A hidden) {
        for (int i = 0; i < count; ++i) {
            hide(s, most(runs[i].begin, seen.prefix), least(seen.first, runs[i].end), hidden);
            hide(s, most(most(seen.last, seen.prefix), runs[i].begin), runs[i].end, hidden);
        }
    }

    // Columns [begin, end), by whole vectors: one that is written by the number cannot be read by the vector soon
    // after.
    static void hide(A* s, int64_t begin, int64_t end, A hidden) {
        constexpr int64_t W = kLanes<A>;
        using Index = typename IndexOf<A>::type;
        Vector<Index> lanes;
#pragma GCC unroll 16
        for (int lane = 0; lane < W; ++lane) lanes[lane] = lane;
        for (int64_t j = begin / W * W; j < end; j += W) {
            const Index from = static_cast<Index>(most(begin - j, 0)), to = static_cast<Index>(least(end - j, W));
            const Vector<A> x = load_vector(s + j), out = Vector<A>{} + hidden;
            store_vector(s + j, ((lanes >= from) & (lanes < to)) ? out : x);
        }
    }

    // `weigh` for softmax and up to a vector of queries, whose lanes are joined together at the end of each pass.
    void exponentials(int64_t r, int64_t count, Matrix<A> scores, const Columns* runs, int parts, const Weighed<A>& to,
                      const A* slopes) const {
        constexpr A kHidden = -__builtin_inf();
        Vector<A> found[kLanes<A>], dots[kLanes<A>];
        A against[kLanes<A>], blind[kLanes<A>] = {};
        for (int64_t i = 0; i < count; ++i) {
            const Visible seen = visible(r + i);
            blind[i] = seen.prefix == 0 && seen.first >= seen.last ? A(1) : A(0);
            hide(scores.from(i).data, seen, runs, parts, kHidden);
            found[i] = most_of(scores.from(i).data, runs, parts);
        }
        Vector<A> largest = each_joined<A>(found, count, Larger{});
        if (most_of_lanes<A>(largest) == -kHidden) largest = with_nans(largest, count, scores, runs, parts);
        // Nothing seen, or only scores of -inf: against 0 every weight is 0. Of nothing the sum is 1 and the mean 0, of
        // the other they are 0 and NaN.
        store_vector(against, largest == kHidden ? Vector<A>{} : largest);
        store_vector(to.largest, largest * score_scale());
        for (int64_t i = 0; i < count; ++i)
            powers(scores.from(i).data, slopes ? slopes + i * scores.stride : nullptr, runs, parts, against[i],
                   found[i], dots[i]);
        const Vector<A> sums = each_joined<A>(found, count, Plus{}) + load_vector(blind);
        store_vector(to.sums, sums);
        if (slopes) store_vector(to.means, each_joined<A>(dots, count, Plus{}) / sums);
    }

    // Largest numbers of the lanes. NaNs are passed over: the sum of the exponentials shows them. Columns come in whole
    // vectors.
    static Vector<A> most_of(const A* x, const Columns* runs, int parts) {
        Vector<A> most = Vector<A>{} - static_cast<A>(__builtin_inf());
        for (int i = 0; i < parts; ++i)
            for (int64_t j = runs[i].begin; j < runs[i].end; j += kLanes<A>) most = Larger{}(load_vector(x + j), most);
        return most;
    }

    // The sum is NaN where the largest score is infinite, and does not show which scores were.
    static Vector<A> with_nans(Vector<A> largest, int64_t count, Matrix<A> scores, const Columns* runs, int parts) {
        for (int64_t i = 0; i < count; ++i)
            for (int part = 0; part < parts; ++part)
                for (int64_t j = runs[part].begin; j < runs[part].end; ++j) {
                    const A s = scores.from(i).data[j];
                    if (s != s && largest[i] == static_cast<A>(__builtin_inf())) largest[i] = s;
                }
        return largest;
    }

    // s becomes 2^-headroom e^(scale (s - against)); its sums by lane, and those of its products with `slopes`, where
    // given.
    void powers(A* s, const A* slopes, const Columns* runs, int parts, A against, Vector<A>& sum,
                Vector<A>& dot) const {
        constexpr A kLog2OfE = 1.44269504088896340736;
        const A factor = score_scale() * kLog2OfE;
        const int down = headroom();
        Vector<A> sums{}, dots{};
        for (int i = 0; i < parts; ++i)
            for (int64_t j = runs[i].begin; j < runs[i].end; j += kLanes<A>) {
                const Vector<A> power = power_of_two((load_vector(s + j) - against) * factor, down);
                store_vector(s + j, power);
                sums += power;
                if (slopes) dots += power * load_vector(slopes + j);
            }
        sum = sums, dot = dots;
    }

    const AttentionProblem& p;
    const Sizes<T>& size_;
    int64_t row_, kv_head_, queries_;
    A* extra_;  // of one token

  public:
    const int64_t keys, total;   // total: queries of all heads
    const int64_t block, part;   // queries of a block, and of a part
    const int64_t score_stride;  // from the scores of one query to the next one's
};

INTERFORMER_LEVEL_END
