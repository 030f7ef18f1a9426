// Forward of the attention kernels: scores = Q K', weights, A = weights V, then gate and residual.
#pragma once

#include "cpu/kernels/attention_row.h"

INTERFORMER_LEVEL_BEGIN

template <typename T>
class AttentionForward {
  public:
    using A = Acc<T>;

    static int64_t memory(const AttentionProblem& p) { return Pieces(p, nullptr).bytes; }

    static void run(const AttentionProblem& p, int64_t first, int64_t last, int64_t kv_head, void* memory) {
        for (int64_t row = first; row < last; ++row) AttentionForward(p, row, kv_head, memory).whole_row();
    }

  private:
    struct Pieces {
        A *keys, *values, *packed_keys, *queries, *scores, *sums, *attended, *extra;
        int64_t bytes;

        Pieces(const AttentionProblem& p, void* memory) {
            const Sizes<A> n(p);
            const int64_t panels = round_up(p.most_keys, kPanel<A>), block = n.most_block(p);
            Memory<A> from(memory);
            keys = from.take(p.most_keys * n.head_stride);
            values = p.v_is_k ? keys : from.take(p.most_keys * n.value_stride);
            packed_keys = from.take(panels * p.head_size);
            queries = from.take(block * n.head_stride);
            scores = from.take(n.most_scores(p));
            sums = from.take(block);
            attended = from.take(block * n.value_stride);
            extra = from.take(n.value_stride);
            bytes = from.bytes();
        }
    };

    AttentionForward(const AttentionProblem& problem, int64_t row, int64_t kv_head, void* memory)
        : p(problem), row_(problem, row, kv_head), size_(problem), pieces_(problem, memory) {}

    void whole_row() const {
        if (row_.total == 0) return;
        const Matrix<const A> keys = row_.tokens(p.k, p.head_size, p.rope.cos, pieces_.keys);
        const Matrix<const A> values = p.v_is_k ? keys : row_.tokens(p.v, p.value_size, false, pieces_.values);
        pack_transposed<A>(keys, row_.keys, p.head_size, pieces_.packed_keys);
        for (int64_t r = 0; r < row_.total; r += row_.block) one_block(r, least(row_.block, row_.total - r), values);
    }

    void one_block(int64_t r, int64_t count, Matrix<const A> values) const {
        Columns runs[2];
        const int parts = row_.columns(r, count, runs);
        row_.load_queries(r, count, pieces_.queries);
        const Matrix<A> scores{pieces_.scores, row_.score_stride}, attended{pieces_.attended, size_.value_stride};
        for (int i = 0; i < parts; ++i)
            multiply_packed<A>({pieces_.queries, size_.head_stride, 1}, pieces_.packed_keys, count, runs[i].begin,
                               runs[i].end, p.head_size, scores);
        for (int64_t i = 0; i < count; ++i) {
            A log_sum = 0;
            pieces_.sums[i] = row_.weigh(r + i, scores.data + i * row_.score_stride, runs, parts, &log_sum);
            if (p.lse.given) *row_.template at<A>(p.lse, r + i) = log_sum;
        }
        weighted_sums({scores.data, row_.score_stride, 1}, values, runs, parts, row_.keys, count, size_.value_stride,
                      attended);
        for (int64_t i = 0; i < count; ++i) finish(r + i, attended.data + i * size_.value_stride, pieces_.sums[i]);
    }

    // Gate, residual and output of one query.
    void finish(int64_t r, A* a, A sum) const {
        const int64_t channels = p.value_size;
        const A factor = static_cast<A>(p.post_scale);
        for (int64_t c = 0; c < channels; ++c) a[c] = p.score.softmax ? a[c] / sum : a[c] * factor;
        if (p.attended.given) narrow(a, channels, row_.at(p.attended, r));
        if (p.gate.given) {
            widen(row_.at(p.gate, r), p.gate.channel, channels, pieces_.extra);
            apply_gate(p.gating, a, pieces_.extra, channels);
        }
        if (p.residual.given) {
            widen(row_.at(p.residual, r), p.residual.channel, channels, pieces_.extra);
            for (int64_t c = 0; c < channels; ++c) a[c] += pieces_.extra[c];
        }
        narrow(a, channels, row_.at(p.out, r));
    }

    const AttentionProblem& p;
    AttentionRow<T> row_;
    Sizes<A> size_;
    Pieces pieces_;
};

INTERFORMER_LEVEL_END
