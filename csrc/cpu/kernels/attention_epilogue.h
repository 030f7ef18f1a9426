// Both ends of one query of attention, in both directions: what happens to the weighted sum of its values (the mean,
// gate, residual, output), and how its gradients arrive and leave. `channels` are those of one head, or of several
// heads of one token where these lie side by side in memory (`heads_adjoin`).
#pragma once

#include "cpu/attention_problem.h"
#include "cpu/kernels/activations.h"
#include "cpu/kernels/memory.h"
#include "cpu/kernels/rotary.h"

INTERFORMER_ISA_BEGIN

// A query of the batch, with the address of its channels in tensors of the queries' layout.
struct QueryPlace {
    int64_t row, token, head;

    template <typename E>
    INTERFORMER_INLINE E* at(const RowTensor& x) const {
        return address<E>(x, row, token, head);
    }
};

// The mean of weighted values from their sum. The mean of finite values is finite, but its rounding may overflow; the
// sum, about half as large, then is finite and tells this case from values that are infinite.
template <typename T>
INTERFORMER_INLINE Vector<Acc<T>> mean_of(Vector<Acc<T>> sum, Vector<Acc<T>> inv_row_sum) {
    using A = Acc<T>;
    const Vector<A> largest = Vector<A>{} + largest_number<T>, mean = sum * inv_row_sum;
    const Vector<A> below = (mean > largest) & (sum <= largest) ? largest : mean;
    return (below < -largest) & (sum >= -largest) ? -largest : below;
}

// Divides weighted sums of values, `channels` padded to whole vectors.
template <typename T>
inline void normalise(Acc<T>* attn_out, int64_t channels, Acc<T> inv_row_sum) {
    using A = Acc<T>;
    for (int64_t c = 0; c < channels; c += kLanes<A>)
        store_vector(attn_out + c, mean_of<T>(load_vector(attn_out + c), Vector<A>{} + inv_row_sum));
}

// The same where `scale` is the factor of the weights that are left. Their sum is no mean, and may overflow.
template <typename T>
inline void normalise(Acc<T>* attn_out, int64_t channels, Acc<T> inv_row_sum, double scale) {
    using A = Acc<T>;
    const A factor = static_cast<A>(scale);
    normalise<T>(attn_out, channels, inv_row_sum);
    if (factor != 1)
        for (int64_t c = 0; c < channels; ++c) attn_out[c] *= factor;
}

template <typename T>
class Epilogue {
  public:
    using A = Acc<T>;

    // `scratch` is memory for as many channels as `finish` gets.
    Epilogue(const AttentionProblem& problem, A* scratch) : p_(problem), scratch_(scratch) {}

    // Whether the heads of a token follow each other in all tensors that `finish` touches.
    bool heads_adjoin() const {
        const auto adjoin = [&](const RowTensor& x) { return !x.given || (x.channel == 1 && x.head == p_.value_size); };
        return p_.heads == p_.kv_heads && adjoin(p_.out) && adjoin(p_.attn_out) && adjoin(p_.gate) &&
               adjoin(p_.residual);
    }

    // Gate, residual and output. Overwrites `attn_out`.
    void finish(const QueryPlace& query, A* attn_out, int64_t channels) const {
        if (p_.attn_out.given) narrow(attn_out, channels, query.at<A>(p_.attn_out));
        if (p_.gate.given) {
            widen(query.at<T>(p_.gate), p_.gate.channel, channels, scratch_);
            apply_gate(p_.gating, attn_out, scratch_, channels);
        }
        if (p_.residual.given) {
            widen(query.at<T>(p_.residual), p_.residual.channel, channels, scratch_);
            for (int64_t c = 0; c < channels; ++c) attn_out[c] += scratch_[c];
        }
        narrow(attn_out, channels, query.at<T>(p_.out));
    }

  private:
    const AttentionProblem& p_;
    A* scratch_;
};

template <typename T>
class EpilogueBackward {
  public:
    using A = Acc<T>;

    // `row_group` is where sums over rows are kept; `scratch` is memory for two heads' values.
    EpilogueBackward(const AttentionProblem& problem, int64_t row_group, A* scratch)
        : p_(problem), row_group_(row_group), attn_out_(scratch), gate_(scratch + problem.value_size) {}

    // Whether `grad_attn_out` only widens.
    bool is_plain() const { return !p_.gate.given && p_.variant.post_scale == 1; }

    // From grad_out to the gradients of attn_out, times the factor of probabilities, and of the gate.
    void grad_attn_out(const QueryPlace& query, A* grad) const {
        const int64_t channels = p_.value_size;
        widen(query.at<T>(p_.grad_out), p_.grad_out.channel, channels, grad);
        if (p_.gate.given) {
            widen(query.at<A>(p_.attn_out), p_.attn_out.channel, channels, attn_out_);
            widen(query.at<T>(p_.gate), p_.gate.channel, channels, gate_);
            gate_backward(p_.gating, attn_out_, gate_, grad, channels);
            if (p_.gate_summed)
                add_gate_gradient(query.at<double>(p_.grad_gate) + row_group_ * p_.grad_gate_group_stride);
            else
                add_gate_gradient(query.at<A>(p_.grad_gate));
        }
        const A factor = static_cast<A>(p_.variant.post_scale);
        if (factor != 1)
            for (int64_t c = 0; c < channels; ++c) grad[c] *= factor;
    }

    // Writes the gradient of a query, or adds it to the sum over rows. `sign` is the factor of queries; `grad` is
    // overwritten.
    void write_grad_q(const QueryPlace& query, int64_t position, A sign, A* grad) const {
        for (int64_t c = 0; c < p_.head_size; ++c) grad[c] *= sign;
        if (p_.shared_queries) {
            double* to = query.at<double>(p_.grad_q) + row_group_ * p_.grad_q_group_stride;
            for (int64_t c = 0; c < p_.head_size; ++c) to[c] += grad[c];
            return;
        }
        if (p_.rope.cos) rotate(p_.rope, position, A(-1), grad);
        narrow(grad, p_.head_size, query.at<T>(p_.grad_q));
    }

  private:
    template <typename Sum>
    void add_gate_gradient(Sum* to) const {
        const int64_t channels = p_.value_size;
        if (p_.gate_channels == channels) {
            for (int64_t c = 0; c < channels; ++c) to[c] += gate_[c];
            return;
        }
        double sum = 0;  // over up to hundreds of channels
        for (int64_t c = 0; c < channels; ++c) sum += gate_[c];
        to[0] += static_cast<Sum>(sum);
    }

    const AttentionProblem& p_;
    int64_t row_group_;
    A *attn_out_, *gate_;
};

INTERFORMER_ISA_END
