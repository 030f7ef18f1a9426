// One row of the batch under one key/value head, as the forward and the backward of attention share it.
//
// The backward takes queries in blocks. The scores of a block are kept for all keys of the row at once, [block, keys],
// so the softmax needs no online update whatever the row's length, and scores are computed only once.
#pragma once

#include "cpu/kernel_table.h"
#include "cpu/kernels/attention_epilogue.h"
#include "cpu/kernels/memory.h"
#include "cpu/kernels/rotary.h"
#include "cpu/kernels/score_variant.h"

INTERFORMER_ISA_BEGIN

// Sizes of a thread's buffers, in numbers (of type A) or operands (of type X).
template <typename T>
struct Sizes {
    using A = Acc<T>;
    using X = Operand<T>;

    int64_t head_stride, value_stride;  // numbers between rows of channels
    int64_t q_per_kv;

    explicit Sizes(const AttentionProblem& p)
        : head_stride(padded<X>(p.head_size)), value_stride(padded<X>(p.value_size)), q_per_kv(p.heads / p.kv_heads) {}

    // Rows of scores are an odd number of cache lines apart, so that reading down a column does not keep to one cache
    // set.
    static int64_t score_stride(int64_t keys) {
        return round_up(keys, kPanel<A>) + 64 / static_cast<int64_t>(sizeof(A));
    }
    // Queries of a block: few enough for their scores to fit the second-level cache, in whole tiles where possible.
    static int64_t block(int64_t queries, int64_t keys) {
        const int64_t tiles = max(kBlockScores / score_stride(keys) / kTileRows, 1);
        return max(1, min(queries, min(tiles, kMaxTiles) * kTileRows));
    }
    // Queries of a shard, in whole blocks. The gradients of a row's keys are summed shard by shard even if one thread
    // computes all of them, so the bits do not depend on the number of threads.
    static int64_t shard(int64_t queries, int64_t keys) {
        const int64_t size = block(queries, keys);
        return size * max(kShardQueries / size, 1);
    }
    bool may_have_shards(const AttentionProblem& p) const { return p.max_queries * q_per_kv > kShardQueries / 2; }
    // Upper bounds over all rows of a problem.
    int64_t max_block(const AttentionProblem& p) const {
        return max(1, min(p.max_queries * q_per_kv, kMaxTiles * kTileRows));
    }
    int64_t max_scores(const AttentionProblem& p) const {
        const int64_t stride = score_stride(p.max_keys);
        return min(max(kBlockScores, kTileRows * stride), max_block(p) * stride);
    }

  private:
    static constexpr int64_t kBlockScores = (128 << 10) / sizeof(A), kMaxTiles = 16, kShardQueries = 512;
};

// Computes the rows and heads of a task: rows of few queries under all heads at once by `few`, others by
// `each(row, kv_head)`. There heads are the inner loop, since the tokens of a row's heads lie side by side in memory.
template <typename Few, typename Each>
inline void for_each_row(const AttentionTask& task, const Few& few, Each&& each) {
    for (int64_t row = task.first_row; row < task.last_row; ++row)
        if (few.serves(row))
            few.run_row(row, task.first_head, task.last_head);
        else
            for (int64_t head = task.first_head; head < task.last_head; ++head) each(row, head);
}

// Whether the keys of a row under all heads are more than hardware fetches in time. `RowAhead` (query_lanes_forward.h)
// fetches shorter rows whole.
constexpr int64_t kShortRowBytes = 64 << 10;
template <typename T>
inline bool is_long_row(const AttentionProblem& p, int64_t row) {
    return p.key_counts[row] * p.kv_heads * p.head_size * static_cast<int64_t>(sizeof(T)) > kShortRowBytes;
}

// The keys and values of the head that a task computes after this one, fetched while products are made of this one;
// none of short rows.
struct NextHead {
    RangeAhead keys, values;

    template <typename T>
    static NextHead of(const AttentionProblem& p, const AttentionTask& task, int64_t row, int64_t kv_head) {
        const bool same_row = kv_head + 1 < task.last_head;
        const int64_t next = same_row ? row : row + 1, head = same_row ? kv_head + 1 : task.first_head;
        if (next >= task.last_row || !is_long_row<T>(p, next)) return {};
        const int64_t keys = p.key_counts[next];
        return {head_ahead<T>(p.k, next, head, keys, p.head_size),
                head_ahead<T>(p.v, next, head, p.v_is_k ? 0 : keys, p.value_size)};
    }
};

template <typename T>
class AttentionRow {
  public:
    using A = Acc<T>;
    using S = Stored<T>;
    using X = Operand<T>;

    // `scratch` is memory for the channels of one token.
    AttentionRow(const AttentionProblem& problem, const Sizes<T>& sizes, int64_t row, int64_t kv_head, A* scratch)
        : AttentionRow(problem, sizes, row_of_head(problem, row, kv_head, sizes.q_per_kv), scratch) {}

    const ScoreVariant<T>& variant() const { return variant_; }
    int64_t index() const { return row_.index; }
    int64_t keys() const { return row_.keys; }
    int64_t kv_head() const { return row_.kv_head; }
    int64_t queries() const { return queries_; }  // over all heads
    int64_t block() const { return block_; }      // queries of a block
    int64_t shard() const { return shard_; }      // queries of a shard
    int64_t shards() const { return max((queries_ + shard_ - 1) / shard_, 1); }
    int64_t score_stride() const { return score_stride_; }  // numbers between the scores of two queries

    QueryPlace query(int64_t r) const { return {row_.index, row_.token(r), row_.head(r)}; }
    T* at(const RowTensor& x, int64_t r) const { return query(r).template at<T>(x); }
    T* key_at(const RowTensor& x, int64_t j) const { return address<T>(x, row_.index, j, row_.kv_head); }

    int64_t query_position(int64_t r) const {
        return position_of(p_.positions_q, p_.query_begins ? p_.query_begins[row_.index] : 0, row_.token(r));
    }
    int64_t key_position(int64_t j) const { return position_of(p_.positions_k, p_.key_begins[row_.index], j); }

    // The columns that a shard (-1: all queries) reads and changes: those that its queries see.
    ColumnRanges shard_columns(int64_t shard) const {
        if (shard < 0) return variant_.all_columns();
        const int64_t first = shard * shard_;
        return first < queries_ ? variant_.column_ranges(first, min(shard_, queries_ - first)) : ColumnRanges{};
    }

    // Whether tokens of k or v may be read where they lie, as far as the row's length decides. Under many queries they
    // are copied next to each other once: heads side by side put the tokens of one head a power of two of bytes apart,
    // where they compete for a few sets of the caches.
    bool reads_in_place(const RowTensor& x, int64_t channels) const {
        constexpr int64_t kCopyQueries = 256;
        return queries_ < kCopyQueries || x.token == channels;
    }

    // The tokens of k or v in place where their layout allows it; else those in the ranges are copied. Channels of the
    // copy beyond the last are 0.
    Matrix<const S> tokens(const RowTensor& x, const ColumnRanges& ranges, int64_t channels, bool rotated,
                           S* copy) const {
        const int64_t stride = padded<X>(channels);
        if constexpr (std::is_same_v<T, S>) {
            const T* first = key_at(x, 0);
            if (!rotated && stride == channels && whole_operands<X>(first, x.token) && reads_in_place(x, channels))
                return {first, x.token};
        }
        for (int i = 0; i < ranges.n; ++i)
            for (int64_t j = ranges.r[i].begin; j < min(ranges.r[i].end, row_.keys); ++j) {
                S* to = copy + j * stride;
                if (rotated) {
                    widen(key_at(x, j), 1, channels, scratch_);
                    rotate(p_.rope, key_position(j), A(1), scratch_);
                    narrow(scratch_, channels, to);
                } else {
                    copy_stored(key_at(x, j), 1, channels, to);
                }
                fill(to + channels, stride - channels, S{});
            }
        return {copy, stride};
    }

    // The same tokens as operands of sums over tokens, of whole vectors of channels.
    Matrix<const X> tokens_along_rows(Matrix<const S> tokens, const ColumnRanges& ranges, int64_t channels,
                                      X* copy) const {
        if constexpr (std::is_same_v<X, S>) {
            return tokens;
        } else {
            const int64_t stride = round_up(channels, kLanes<X>);
            for (int i = 0; i < ranges.n; ++i) {
                const int64_t begin = ranges.r[i].begin, end = min(ranges.r[i].end, row_.keys);
                along_rows<X>(tokens.from(begin), end - begin, channels, copy + operands<X>(begin) * stride);
            }
            return {copy, stride};
        }
    }

    // Queries [r, r + count), rotated, as rows of an operand: in place where they are few, else copied, which packs
    // them more densely in the cache. Their products with keys are yet to be multiplied by `score_scale`.
    Matrix<const S> query_rows(int64_t r, int64_t count, S* copy) const {
        constexpr int64_t kInPlaceQueries = 32;
        const bool unchanged = !p_.rope.cos && p_.variant.scale > 0;
        if constexpr (std::is_same_v<T, S>) {
            const int64_t stride = sizes_.q_per_kv == 1 ? p_.q.token : p_.q.head;
            const bool even = sizes_.q_per_kv == 1 || p_.q.token == sizes_.q_per_kv * p_.q.head;
            const T* first = at(p_.q, r);
            if (queries_ <= kInPlaceQueries && unchanged && even && p_.q.channel == 1 &&
                p_.head_size == sizes_.head_stride && whole_operands<X>(first, stride))
                return {first, stride};
        }
        S* to = copy;
        for (int64_t i = 0; i < count; ++i, to += sizes_.head_stride) {
            if (unchanged) {
                copy_stored(at(p_.q, r + i), p_.q.channel, p_.head_size, to);
            } else {
                widen(at(p_.q, r + i), p_.q.channel, p_.head_size, scratch_);
                if (p_.rope.cos) rotate(p_.rope, query_position(r + i), A(1), scratch_);
                for (int64_t c = 0; c < p_.head_size; ++c) scratch_[c] *= variant_.query_sign();
                narrow(scratch_, p_.head_size, to);
            }
            fill(to + p_.head_size, sizes_.head_stride - p_.head_size, S{});
        }
        return {copy, sizes_.head_stride};
    }

  private:
    AttentionRow(const AttentionProblem& problem, const Sizes<T>& sizes, const RowOfHead& row, A* scratch)
        : p_(problem),
          sizes_(sizes),
          row_(row),
          scratch_(scratch),
          variant_(problem, row),
          queries_(row.queries()),
          block_(sizes.block(queries_, row.keys)),
          shard_(sizes.shard(queries_, row.keys)),
          score_stride_(sizes.score_stride(row.keys)) {}

    const AttentionProblem& p_;
    const Sizes<T>& sizes_;
    RowOfHead row_;
    A* scratch_;
    ScoreVariant<T> variant_;
    int64_t queries_, block_, shard_, score_stride_;
};

INTERFORMER_ISA_END
