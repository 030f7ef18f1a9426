// What forward and backward of the attention kernels share: one row of the batch under one key/value head.
//
// Its queries are taken in blocks; query `r` of `[0, queries * group)` is token `r / group` under head
// `kv_head * group + r % group`. Scores of a block are kept for all keys of the row at once, [block, keys], so that the
// softmax is the plain one, whatever the row's length, and the backward computes them once.
#pragma once

#include <type_traits>

#include "cpu/attention_problem.h"
#include "cpu/kernels/memory.h"
#include "cpu/kernels/multiply.h"
#include "cpu/kernels/rotary.h"
#include "cpu/kernels/scalar_maps.h"

INTERFORMER_LEVEL_BEGIN

// Row strides of what a thread keeps. They are odd numbers of cache lines where columns are read, so that what is read
// down a column does not crowd one set of the cache.
template <typename A>
struct Sizes {
    int64_t head_stride, value_stride, group;

    explicit Sizes(const AttentionProblem& p)
        : head_stride(round_up(p.head_size, kLanes<A>)),
          value_stride(round_up(p.value_size, kLanes<A>)),
          group(p.heads / p.kv_heads) {}

    static int64_t score_stride(int64_t keys) {
        return round_up(keys, kPanel<A>) + 64 / static_cast<int64_t>(sizeof(A));
    }
    // Queries whose scores are kept at once: few enough for the second level of cache, whole tiles where possible.
    static int64_t block(int64_t queries, int64_t keys) {
        const int64_t tiles = most(kScores / score_stride(keys) / kTileRows, 1);
        return most(1, least(queries, least(tiles, kMostTiles) * kTileRows));
    }
    // Bounds of `block` and of the scores of a block over all rows of a problem.
    int64_t most_block(const AttentionProblem& p) const {
        return most(1, least(p.most_queries * group, kMostTiles * kTileRows));
    }
    int64_t most_scores(const AttentionProblem& p) const {
        const int64_t stride = score_stride(p.most_keys);
        return least(most(kScores, kTileRows * stride), most_block(p) * stride);
    }

  private:
    static constexpr int64_t kScores = (128 << 10) / sizeof(A), kMostTiles = 16;
};

// Columns of the scores [begin, end), multiples of the panel: those that some query of a block sees.
struct Columns {
    int64_t begin, end;
};

// The keys that one query sees: [0, prefix) and [first, last).
struct Visible {
    int64_t prefix, first, last;
};

// `to [count, columns]` = sum over the keys j of the columns' runs of `weights[., j] * tokens[j]`. Long sums are made
// in pieces, which keeps them exact.
template <typename A>
void weighted_sums(Scalars<A> weights, Matrix<const A> tokens, const Columns* runs, int parts, int64_t keys,
                   int64_t count, int64_t columns, Matrix<A> to) {
    constexpr int64_t kPiece = 64;
    bool add = false;
    for (int i = 0; i < parts; ++i)
        for (int64_t j = runs[i].begin; j < least(runs[i].end, keys); j += kPiece) {
            const int64_t depth = least(kPiece, least(runs[i].end, keys) - j);
            multiply<A>(weights.from(0, j), {tokens.data + j * tokens.stride, tokens.stride}, count, columns, depth, to,
                        add);
            add = true;
        }
    if (!add)
        for (int64_t i = 0; i < count; ++i) fill(to.data + i * to.stride, columns, A(0));
}

template <typename T>
class AttentionRow {
  public:
    using A = Acc<T>;

    AttentionRow(const AttentionProblem& problem, int64_t row, int64_t kv_head)
        : p(problem),
          row_(row),
          kv_head_(kv_head),
          queries_(p.query_counts ? p.query_counts[row] : p.queries),
          size_(problem),
          keys(p.key_counts[row]),
          total(queries_ * size_.group),
          block(size_.block(total, keys)),
          score_stride(size_.score_stride(keys)) {}

    int64_t token(int64_t r) const { return r / size_.group; }
    int64_t head(int64_t r) const { return kv_head_ * size_.group + r % size_.group; }

    template <typename X = T>
    X* at(const RowTensor& x, int64_t r) const {
        return address<T, X>(x, row_, token(r), head(r));
    }

    // Whether tokens of k (or v) can be multiplied where they lie.
    static bool in_place(int64_t channels, bool rotated) {
        return std::is_same_v<T, A> && !rotated && channels % kLanes<A> == 0;
    }

    // Tokens of k or v as rows of numbers of type A, in place or copied; channels beyond the last are 0.
    Matrix<const A> tokens(const RowTensor& x, int64_t channels, bool rotate, A* copy) const {
        const int64_t stride = round_up(channels, kLanes<A>);
        if constexpr (std::is_same_v<T, A>)
            if (in_place(channels, rotate)) return {address<T>(x, row_, 0, kv_head_), x.token};
        for (int64_t j = 0; j < keys; ++j) {
            A* to = copy + j * stride;
            widen(address<T>(x, row_, j, kv_head_), 1, channels, to);
            fill(to + channels, stride - channels, A(0));
            if (rotate) turn(p.rope, key_position(j), A(1), to);
        }
        return {copy, stride};
    }

    // Queries [r, r + count) scaled, rotated, as rows.
    void load_queries(int64_t r, int64_t count, A* to) const {
        for (int64_t i = 0; i < count; ++i, to += size_.head_stride) {
            widen(at(p.q, r + i), p.q.channel, p.head_size, to);
            fill(to + p.head_size, size_.head_stride - p.head_size, A(0));
            if (p.rope.cos) turn(p.rope, query_position(r + i), A(1), to);
            const A scale = static_cast<A>(p.scale);
            for (int64_t c = 0; c < p.head_size; ++c) to[c] *= scale;
        }
    }

    int64_t query_position(int64_t r) const {
        return position_of(p.positions_q, p.query_begins ? p.query_begins[row_] : 0, token(r));
    }
    int64_t key_position(int64_t j) const { return position_of(p.positions_k, p.key_begins[row_], j); }

    Visible visible(int64_t r) const {
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
        const int64_t begin = first / kPanel<A> * kPanel<A>, prefix_end = round_up(prefix, kPanel<A>);
        if (prefix > 0 && prefix_end < begin && first < last) to[runs++] = {0, prefix_end};
        const bool joined = prefix > 0 && runs == 0;
        if (first < last || joined)
            to[runs++] = {joined ? 0 : begin, most(round_up(last, kPanel<A>), joined ? prefix_end : 0)};
        return runs;
    }

    // Scores of one query over its block's columns become weights: zero where it does not see. For softmax they are to
    // be divided by the sum that is returned, and `log_sum` (where asked for) is set; else they are act(score), without
    // `post_scale`, and 1 is returned.
    A weigh(int64_t r, A* s, const Columns* runs, int count, A* log_sum) const {
        const Visible seen = visible(r);
        if (!p.score.softmax) {
            for (int i = 0; i < count; ++i)
                activate(p.score.activation, s + runs[i].begin, runs[i].end - runs[i].begin);
            hide(s, seen, runs, count, A(0));
            return A(1);
        }
        const A hidden = -__builtin_inf();
        hide(s, seen, runs, count, hidden);
        A largest = hidden;
        for (int i = 0; i < count; ++i) largest = most_of(s + runs[i].begin, runs[i].end - runs[i].begin, largest);
        // Nothing seen, or only scores of -inf: against 0 every weight is 0. Of nothing the mean is 0, of the other
        // NaN.
        const A against = largest == hidden ? A(0) : largest;
        A sum = 0;
        for (int i = 0; i < count; ++i) sum += exponentials(s + runs[i].begin, runs[i].end - runs[i].begin, against);
        if (log_sum) *log_sum = largest == hidden || largest == -hidden ? largest : largest + log_of(sum);
        const bool blind = seen.prefix == 0 && seen.first >= seen.last;
        return blind ? A(1) : sum;
    }

    // Scores without softmax become weights, and gradients of the weights those of the scores.
    void activate_with_gradients(int64_t r, A* s, A* grads, const Columns* runs, int count) const {
        for (int i = 0; i < count; ++i)
            activate_with_slopes(p.score.activation, s + runs[i].begin, grads + runs[i].begin,
                                 runs[i].end - runs[i].begin);
        const Visible seen = visible(r);
        hide(s, seen, runs, count, A(0));
        hide(grads, seen, runs, count, A(0));
    }

  private:
    static float log_of(float x) { return __builtin_logf(x); }
    static double log_of(double x) { return __builtin_log(x); }

    static void hide(A* s, const Visible& seen, const Columns* runs, int count, A hidden) {
        for (int i = 0; i < count; ++i) {
            const int64_t from = most(runs[i].begin, seen.prefix), before = least(seen.first, runs[i].end);
            for (int64_t j = from; j < before; ++j) s[j] = hidden;
            for (int64_t j = most(most(seen.last, seen.prefix), runs[i].begin); j < runs[i].end; ++j) s[j] = hidden;
        }
    }

    // Largest of the numbers; a NaN wins and stays.
    static A most_of(const A* x, int64_t count, A largest) {
        constexpr int64_t W = kLanes<A>;
        Vector<A> most = Vector<A>{} + largest;
        for (int64_t j = 0; j < count; j += W) {  // columns come in whole panels
            const Vector<A> next = load_vector(x + j);
            most = ((next > most) | (next != next)) ? next : most;
        }
        for (int64_t lane = 0; lane < W; ++lane)
            if (most[lane] > largest || most[lane] != most[lane]) largest = most[lane];
        return largest;
    }

    // x becomes e^(x - against); returns the sum. Columns come in whole panels.
    static A exponentials(A* x, int64_t count, A against) {
        Vector<A> sums{};
        for (int64_t j = 0; j < count; j += kLanes<A>) {
            const Vector<A> power = exponential(load_vector(x + j) - against);
            store_vector(x + j, power);
            sums += power;
        }
        return sum_of<A>(sums);
    }

    const AttentionProblem& p;
    int64_t row_, kv_head_, queries_;
    Sizes<A> size_;

  public:
    const int64_t keys, total;          // total: queries of all heads
    const int64_t block, score_stride;  // queries of a block, and from one's scores to the next one's
};

INTERFORMER_LEVEL_END
