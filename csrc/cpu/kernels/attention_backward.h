// Backward of the attention kernels, in one pass over the queries: scores and weights P again, dP = dA V', then
//
//     dS = P * (dP - sum over keys of P * dP)      (softmax; else post_scale * act'(S) * dP)
//     dQ = scale dS K,   dK += scale dS' Q,   dV += P' dA
#pragma once

#include "cpu/kernels/attention_row.h"

INTERFORMER_LEVEL_BEGIN

template <typename T>
class AttentionBackward {
  public:
    using A = Acc<T>;

    static int64_t memory(const AttentionProblem& p) { return Pieces(p, nullptr).bytes; }

    static void run(const AttentionProblem& p, int64_t first, int64_t last, int64_t kv_head, int64_t run,
                    void* memory) {
        for (int64_t row = first; row < last; ++row) AttentionBackward(p, row, kv_head, run, memory).whole_row();
    }

  private:
    struct Pieces {
        A *keys, *values, *packed_keys, *packed_values, *queries, *scores, *slopes, *grad_a, *grad_q, *grad_k, *grad_v,
            *attended, *gate;
        int64_t bytes;

        Pieces(const AttentionProblem& p, void* memory) {
            const Sizes<A> n(p);
            const int64_t panels = round_up(p.most_keys, kPanel<A>), block = n.most_block(p);
            Memory<A> from(memory);
            keys = from.take(p.most_keys * n.head_stride);
            values = p.v_is_k ? keys : from.take(p.most_keys * n.value_stride);
            packed_keys = from.take(panels * p.head_size);
            packed_values = p.v_is_k ? packed_keys : from.take(panels * p.value_size);
            queries = from.take(block * n.head_stride);
            scores = from.take(n.most_scores(p));
            slopes = from.take(n.most_scores(p));
            grad_a = from.take(block * n.value_stride);
            grad_q = from.take(block * n.head_stride);
            grad_k = from.take(p.most_keys * n.head_stride);
            grad_v = p.v_is_k ? grad_k : from.take(p.most_keys * n.value_stride);
            attended = from.take(n.value_stride);
            gate = from.take(n.value_stride);
            bytes = from.bytes();
        }
    };

    AttentionBackward(const AttentionProblem& problem, int64_t row, int64_t kv_head, int64_t run, void* memory)
        : p(problem),
          batch_row_(row),
          kv_head_(kv_head),
          run_(run),
          row_(problem, row, kv_head),
          size_(problem),
          pieces_(problem, memory) {}

    void whole_row() const {
        const Matrix<const A> keys = row_.tokens(p.k, p.head_size, p.rope.cos, pieces_.keys);
        const Matrix<const A> values = p.v_is_k ? keys : row_.tokens(p.v, p.value_size, false, pieces_.values);
        pack_transposed<A>(keys, row_.keys, p.head_size, pieces_.packed_keys);
        if (!p.v_is_k) pack_transposed<A>(values, row_.keys, p.value_size, pieces_.packed_values);
        fill(pieces_.grad_k, row_.keys * size_.head_stride, A(0));
        if (!p.v_is_k) fill(pieces_.grad_v, row_.keys * size_.value_stride, A(0));
        for (int64_t r = 0; r < row_.total; r += row_.block) one_block(r, least(row_.block, row_.total - r), keys);
        write_key_gradients();
    }

    void one_block(int64_t r, int64_t count, Matrix<const A> keys) const {
        Columns runs[2];
        const int parts = row_.columns(r, count, runs);
        const Matrix<A> weights{pieces_.scores, row_.score_stride}, slopes{pieces_.slopes, row_.score_stride};
        const Matrix<A> queries{pieces_.queries, size_.head_stride}, grad_a{pieces_.grad_a, size_.value_stride};
        row_.load_queries(r, count, queries.data);
        for (int64_t i = 0; i < count; ++i) back_through_epilogue(r + i, grad_a.data + i * grad_a.stride);
        for (int i = 0; i < parts; ++i) {
            multiply_packed<A>({queries.data, queries.stride, 1}, pieces_.packed_keys, count, runs[i].begin,
                               runs[i].end, p.head_size, weights);
            multiply_packed<A>({grad_a.data, grad_a.stride, 1}, pieces_.packed_values, count, runs[i].begin,
                               runs[i].end, p.value_size, slopes);
        }
        for (int64_t i = 0; i < count; ++i)
            score_gradients(r + i, weights.data + i * row_.score_stride, slopes.data + i * row_.score_stride, runs,
                            parts);
        weighted_sums({slopes.data, row_.score_stride, 1}, keys, runs, parts, row_.keys, count, size_.head_stride,
                      Matrix<A>{pieces_.grad_q, size_.head_stride});
        for (int64_t i = 0; i < count; ++i) write_query_gradient(r + i, pieces_.grad_q + i * size_.head_stride);
        for (int i = 0; i < parts; ++i) {
            const int64_t j = runs[i].begin, tokens = least(runs[i].end, row_.keys) - j;
            multiply<A>({slopes.data + j, 1, row_.score_stride}, {queries.data, queries.stride}, tokens,
                        size_.head_stride, count, {pieces_.grad_k + j * size_.head_stride, size_.head_stride}, true);
            multiply<A>({weights.data + j, 1, row_.score_stride}, {grad_a.data, grad_a.stride}, tokens,
                        size_.value_stride, count, {pieces_.grad_v + j * size_.value_stride, size_.value_stride}, true);
        }
    }

    // From grad_out to the gradients of A and of the gate.
    void back_through_epilogue(int64_t r, A* grad_a) const {
        const int64_t channels = p.value_size;
        widen(row_.at(p.grad_out, r), p.grad_out.channel, channels, grad_a);
        fill(grad_a + channels, size_.value_stride - channels, A(0));
        if (!p.gate.given) return;
        widen(row_.at(p.attended, r), p.attended.channel, channels, pieces_.attended);
        widen(row_.at(p.gate, r), p.gate.channel, channels, pieces_.gate);
        back_through_gate(p.gating, pieces_.attended, pieces_.gate, grad_a, channels);
        if (p.gate_summed)
            add_gate_gradient(row_.template at<double>(p.grad_gate, r) + run_ * p.gate_run);
        else
            add_gate_gradient(row_.template at<A>(p.grad_gate, r));
    }

    template <typename Sum>
    void add_gate_gradient(Sum* to) const {
        const int64_t channels = p.value_size;
        if (p.gate_channels == channels) {
            for (int64_t c = 0; c < channels; ++c) to[c] += pieces_.gate[c];
            return;
        }
        Sum sum = 0;
        for (int64_t c = 0; c < channels; ++c) sum += pieces_.gate[c];
        to[0] += sum;
    }

    // Scores become the weights of v in A, gradients of the weights become those of the scaled scores.
    void score_gradients(int64_t r, A* weights, A* slopes, const Columns* runs, int parts) const {
        if (p.score.softmax) {
            const A sum = row_.weigh(r, weights, runs, parts, nullptr);
            for (int i = 0; i < parts; ++i)
                for (int64_t j = runs[i].begin; j < runs[i].end; ++j) weights[j] /= sum;
            A mean = 0;
            for (int i = 0; i < parts; ++i) mean += dot(weights, slopes, runs[i]);
            for (int i = 0; i < parts; ++i)
                for (int64_t j = runs[i].begin; j < runs[i].end; ++j) slopes[j] = weights[j] * (slopes[j] - mean);
            return;
        }
        const A factor = static_cast<A>(p.post_scale);
        row_.activate_with_gradients(r, weights, slopes, runs, parts);
        for (int i = 0; i < parts; ++i)
            for (int64_t j = runs[i].begin; j < runs[i].end; ++j) weights[j] *= factor, slopes[j] *= factor;
    }

    static A dot(const A* x, const A* y, Columns run) {
        constexpr int64_t W = kLanes<A>;
        Vector<A> sums{};
        for (int64_t j = run.begin; j < run.end; j += W) sums += load_vector(x + j) * load_vector(y + j);
        return sum_of<A>(sums);
    }

    void write_query_gradient(int64_t r, A* grad) const {
        const A scale = static_cast<A>(p.scale);
        for (int64_t c = 0; c < p.head_size; ++c) grad[c] *= scale;
        if (p.shared_queries) {
            double* to = row_.template at<double>(p.grad_q, r) + run_ * p.query_run;
            for (int64_t c = 0; c < p.head_size; ++c) to[c] += grad[c];
            return;
        }
        if (p.rope.cos) turn(p.rope, row_.query_position(r), A(-1), grad);
        narrow(grad, p.head_size, row_.at(p.grad_q, r));
    }

    void write_key_gradients() const {
        for (int64_t j = 0; j < row_.keys; ++j) {
            A* grad = pieces_.grad_k + j * size_.head_stride;
            if (p.rope.cos) turn(p.rope, row_.key_position(j), A(-1), grad);
            narrow(grad, p.head_size, address<T>(p.grad_k, batch_row_, j, kv_head_));
            if (!p.v_is_k)
                narrow(pieces_.grad_v + j * size_.value_stride, p.value_size,
                       address<T>(p.grad_v, batch_row_, j, kv_head_));
        }
    }

    const AttentionProblem& p;
    int64_t batch_row_, kv_head_, run_;
    AttentionRow<T> row_;
    Sizes<A> size_;
    Pieces pieces_;
};

INTERFORMER_LEVEL_END
