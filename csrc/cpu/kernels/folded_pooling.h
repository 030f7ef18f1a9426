// Pooling of raw tokens by queries that all rows share, projected before it leaves the cache: the forward of
// `FoldedProblem`.
//
// Rows are taken in blocks. All tokens of a block's short rows are one operand of the scores' product, whose tiles
// would be too low for a row of a few tokens. The block's pooled sums are multiplied by W_v where they lie, and divided
// by their softmax's sum afterwards: D numbers of a head instead of E.
#pragma once

#include "cpu/kernel_table.h"
#include "cpu/kernels/attention_epilogue.h"
#include "cpu/kernels/folded_weights.h"
#include "cpu/kernels/query_lanes.h"
#include "cpu/kernels/score_lanes.h"

INTERFORMER_ISA_BEGIN

template <typename T>
class FoldedPooling {
  public:
    using A = Acc<T>;
    using S = Stored<T>;
    using X = Operand<T>;

    static int64_t memory(const FoldedProblem& p) { return FoldedPooling(p, nullptr, nullptr).bytes_; }

    // The rows [first, last).
    static void run(const FoldedProblem& p, const void* shared, int64_t first, int64_t last, void* memory) {
        const FoldedPooling pooling(p, const_cast<void*>(shared), memory);
        for (int64_t row = first; row < last; row += pooling.block_rows_) {
            const int64_t count = min(pooling.block_rows_, last - row);
            pooling.pool_block(row, count);
            pooling.project(row, count);
        }
    }

  private:
    static constexpr int64_t W = kLanes<A>;
    static constexpr int64_t kProjected = 16;                  // pooled vectors of a head that are projected at once
    static constexpr int64_t kChunk = (32 << 10) / sizeof(A);  // numbers of a chunk of tokens

    FoldedPooling(const FoldedProblem& p, void* shared, void* memory)
        : p_(p),
          rows_(p.pooling),
          weights_(p, shared),
          units_(rows_.queries * rows_.heads),
          channels_(round_up(rows_.head_size, W)),
          // An odd number of vectors, so that projected vectors, H units apart, do not keep to one set of the cache.
          unit_stride_(channels_ + (channels_ / W % 2 == 0 ? W : 0)),
          chunk_(max(W, min(128, kChunk / channels_ / W * W))),
          block_rows_(max(1, kProjected / max(rows_.queries, 1))) {
        Arena arena(memory);
        copy_ = arena.allocate<S>(chunk_ * padded<X>(rows_.head_size));
        value_rows_ = kNumbers<X> == 1 ? nullptr : arena.allocate<X>(operands<X>(chunk_) * channels_);
        scores_ = arena.allocate<A>(chunk_ * kPanel<A>);
        sums_ = arena.allocate<A>(block_rows_ * units_ * unit_stride_);
        inv_row_sums_ = arena.allocate<A>(block_rows_ * padded_units());
        projected_ = arena.allocate<A>(block_rows_ * units_ * weights_.head_stride());
        bytes_ = arena.bytes();
    }

    int64_t padded_units() const { return round_up(units_, kPanel<A>); }
    A* sums_of(int64_t slot, int64_t unit) const { return sums_ + (slot * units_ + unit) * unit_stride_; }

    // ---------------------------------------------------------------- pooling

    // Row `first + i` is pooled into slot i.
    void pool_block(int64_t first, int64_t count) const {
        const int64_t *begins = rows_.key_begins + first, *counts = rows_.key_counts + first;
        for (int64_t i = 0, next = 1; i < count; i = next++) {
            int64_t tokens = counts[i];
            while (next < count && begins[next] == begins[next - 1] + counts[next - 1] &&
                   tokens + counts[next] <= chunk_)
                tokens += counts[next++];
            for (int64_t unit = 0; unit < units_; unit += kPanel<A>)
                if (units_ - unit > W)
                    pool<2>(first, i, next, tokens, unit);
                else
                    pool<1>(first, i, next, tokens, unit);
        }
    }

    // The slots [begin, end), whose rows follow one another in memory and have so many tokens, under N vectors of
    // units. Several rows fit a chunk.
    template <int N>
    void pool(int64_t first, int64_t begin, int64_t end, int64_t tokens, int64_t unit) const {
        if (end - begin == 1) return pool_row<N>(first + begin, begin, unit);
        Matrix<const S> values = read(rows_.key_begins[first + begin], tokens);
        A* scores = scores_;
        score<N>(values, tokens, unit);
        for (int64_t slot = begin; slot < end; ++slot) {
            const int64_t keys = rows_.key_counts[first + slot];
            const ScoreVariant<T> variant = variant_of(first + slot);
            ScoreLanes<T, N> lanes(variant, unit, min(N * W, units_ - unit));
            add_chunk(lanes, values, 0, keys, scores, slot, unit);
            finish(lanes, slot, unit, keys);
            values = values.from(keys);
            scores += keys * N * W;
        }
    }

    // A row of any length, in chunks.
    template <int N>
    void pool_row(int64_t row, int64_t slot, int64_t unit) const {
        const int64_t keys = rows_.key_counts[row];
        const ScoreVariant<T> variant = variant_of(row);
        ScoreLanes<T, N> lanes(variant, unit, min(N * W, units_ - unit));
        for (int64_t j = 0; j < keys; j += chunk_) {
            const int64_t count = min(chunk_, keys - j);
            const Matrix<const S> tokens = read(rows_.key_begins[row] + j, count);
            score<N>(tokens, count, unit);
            add_chunk(lanes, tokens, j, count, scores_, slot, unit);
        }
        finish(lanes, slot, unit, keys);
    }

    ScoreVariant<T> variant_of(int64_t row) const {
        return {rows_, {row, 0, rows_.queries, rows_.key_counts[row], rows_.heads}};
    }

    // Tokens [first, first + count) of the batch, in place where products can read them so.
    Matrix<const S> read(int64_t first, int64_t count) const {
        const RowTensor& x = rows_.k;
        const T* from = static_cast<const T*>(x.data) + first * x.token;
        const int64_t width = rows_.head_size, stride = padded<X>(width);
        if constexpr (std::is_same_v<T, S>)
            if (x.channel == 1 && width % (kNumbers<X> == 1 ? W : kNumbers<X>) == 0 && whole_operands<X>(from, x.token))
                return {from, x.token};
        for (int64_t t = 0; t < count; ++t) {
            S* to = copy_ + t * stride;
            copy_stored(from + t * x.token, x.channel, width, to);
            fill(to + width, stride - width, S{});
        }
        return {copy_, stride};
    }

    template <int N>
    void score(Matrix<const S> tokens, int64_t count, int64_t unit) const {
        const Matrix<const X> keys = along_columns<X>(tokens);
        lane_scores<X, N>({keys.data, keys.stride}, weights_.queries(unit), count, operands<X>(rows_.head_size),
                          scores_);
    }

    // Adds keys [j, j + count) of a row, whose scores are given, to its sums.
    template <int N>
    void add_chunk(ScoreLanes<T, N>& lanes, Matrix<const S> tokens, int64_t j, int64_t count, A* scores, int64_t slot,
                   int64_t unit) const {
        if (count == 0) return;
        const int64_t units = min(N * W, units_ - unit);
        const Matrix<A> sums{sums_of(slot, unit), unit_stride_};
        if (lanes.scores_to_probs(j, count, scores) && j > 0)
            for (int64_t i = 0; i < units; ++i) scale(sums.from(i).data, lanes.rescale()[i]);
        lane_sums<X, N>(operands_in<X>(scores), along_rows<X>(tokens, count, rows_.head_size, value_rows_), units,
                        channels_, operands<X>(count), sums, j > 0);
    }

    void scale(A* sums, A factor) const {
        for (int64_t c = 0; c < channels_; c += W) store_vector(sums + c, load_vector(sums + c) * factor);
    }

    template <int N>
    void finish(ScoreLanes<T, N>& lanes, int64_t slot, int64_t unit, int64_t keys) const {
        lanes.inv_row_sums(inv_row_sums_ + slot * padded_units() + unit);
        if (keys > 0) return;
        for (int64_t i = unit; i < min(unit + N * W, units_); ++i) fill(sums_of(slot, i), channels_, A(0));
    }

    // ---------------------------------------------------------------- projecting

    void project(int64_t first, int64_t count) const {
        const int64_t row_stride = rows_.heads * weights_.head_stride();
        for (int64_t head = 0; head < rows_.heads; ++head) {
            const KeyScalars<A> pooled{sums_of(0, head), rows_.heads * unit_stride_};
            const Matrix<const A> weight = weights_.value_weight(head);
            multiply_pooled(pooled, weight, count * rows_.queries,
                            {projected_ + head * weights_.head_stride(), row_stride});
        }
        for (int64_t slot = 0; slot < count; ++slot) {
            if (p_.pooled.given) write_pooled(first + slot, slot);
            write(first + slot, slot);
        }
    }

    void multiply_pooled(KeyScalars<A> pooled, Matrix<const A> weight, int64_t count, Matrix<A> to) const {
        constexpr int64_t kStepDepth = 64;  // a long sum is made in steps
        const int64_t width = rows_.head_size, columns = weights_.head_stride();
        for (int64_t k = 0; k < width; k += kStepDepth) {
            const int64_t depth = min(kStepDepth, width - k);
            const A* rows = weight.from(k).data;
            int64_t c = 0;
            for (; c + kPanel<A> <= columns; c += kPanel<A>)
                lane_columns<A, 2>(pooled.from(0, k), rows + c, columns, count, depth, to.data + c, to.stride, k > 0);
            if (c < columns)
                lane_columns<A, 1>(pooled.from(0, k), rows + c, columns, count, depth, to.data + c, to.stride, k > 0);
        }
    }

    // Divides projected sums and adds the bias. A row without tokens is 0.
    void write(int64_t row, int64_t slot) const {
        const int64_t size = p_.head_size, stride = weights_.head_stride();
        const A* inv_row_sums = inv_row_sums_ + slot * padded_units();
        const bool empty = rows_.key_counts[row] == 0;
        A* from = projected_ + slot * units_ * stride;
        for (int64_t m = 0, unit = 0; m < rows_.queries; ++m)
            for (int64_t head = 0; head < rows_.heads; ++head, ++unit, from += stride) {
                const A* bias = weights_.value_bias() + head * stride;
                T* to = address<T>(p_.out, row, m, head);
                int64_t c = 0;
                for (; c < size; c += W) {
                    const Vector<A> sum = load_vector(from + c) * inv_row_sums[unit] + load_vector(bias + c);
                    const Vector<A> projected = empty ? Vector<A>{} : sum;
                    if (c + W <= size)
                        store_wide(to + c, projected);
                    else
                        store_first(to + c, size - c, projected);
                }
            }
    }

    void write_pooled(int64_t row, int64_t slot) const {
        const A* inv_row_sums = inv_row_sums_ + slot * padded_units();
        for (int64_t unit = 0; unit < units_; ++unit) {
            const A* sums = sums_of(slot, unit);
            T* to = address<T>(p_.pooled, row, unit / rows_.heads, unit % rows_.heads);
            for (int64_t c = 0; c < rows_.head_size; c += W) {
                const Vector<A> mean = mean_of<T>(load_vector(sums + c), Vector<A>{} + inv_row_sums[unit]);
                if (c + W <= rows_.head_size)
                    store_wide(to + c, mean);
                else
                    store_first(to + c, rows_.head_size - c, mean);
            }
        }
    }

    const FoldedProblem& p_;
    const AttentionProblem& rows_;
    const FoldedWeights<T> weights_;
    const int64_t units_, channels_, unit_stride_, chunk_, block_rows_;
    S* copy_;        // [chunk_, E]
    X* value_rows_;  // [operands of chunk_, E]; pairs only
    A* scores_;      // [chunk_, units of a tile]
    A* sums_;        // [block_rows_, units, E], before their division by the softmax's sums
    A* inv_row_sums_;
    A* projected_;  // [block_rows_, units, D]
    int64_t bytes_;
};

INTERFORMER_ISA_END
