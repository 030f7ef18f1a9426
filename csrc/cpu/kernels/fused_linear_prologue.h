// The part of a fused linear layer before its product, act(norm(x)) * gate, token by token, in both directions.
#pragma once

#include "cpu/kernel_table.h"
#include "cpu/kernels/activations.h"
#include "cpu/kernels/memory.h"

INTERFORMER_ISA_BEGIN

template <typename A>
inline A square_root(A x) {
    if constexpr (sizeof(A) == sizeof(double))
        return __builtin_sqrt(x);
    else
        return __builtin_sqrtf(x);
}

// The sum of term(e) over [0, count), by whole vectors and then number by number.
template <typename A, typename OfVector, typename OfNumber>
INTERFORMER_INLINE A sum_over(int64_t count, OfVector&& of_vector, OfNumber&& of_number) {
    Vector<A> sums{};
    int64_t e = 0;
    for (; e + kLanes<A> <= count; e += kLanes<A>) sums += of_vector(e);
    A total = reduce_lanes<A>(sums, Plus{});
    for (; e < count; ++e) total += of_number(e);
    return total;
}

template <typename T>
class LinearPrologue {
  public:
    using A = Acc<T>;

    explicit LinearPrologue(const LinearProblem& problem)
        : p(problem),
          norm_(problem.norm_weight.given),
          active_(problem.activation != Activation::identity),
          streams_(problem.stream && problem.inputs % kLanes<A> == 0 && aligned(problem.grad_x) &&
                   aligned(problem.grad_gate)) {}

    bool empty() const { return !norm_ && !active_ && !p.gate.given; }

    // Whether gradients go past the caches.
    bool streams() const { return streams_; }

    // Memory for blocks of `tokens` tokens.
    void allocate(Arena& arena, int64_t tokens, bool fills) {
        const int64_t stride = round_up(p.inputs, kLanes<A>);
        norm_weight_ = arena.allocate<A>(norm_ ? stride : 0);
        norm_bias_ = arena.allocate<A>(norm_ ? stride : 0);
        means_ = arena.allocate<A>(norm_ ? tokens : 0);
        scales_ = arena.allocate<A>(norm_ ? tokens : 0);
        value_ = arena.allocate<A>(stride);
        gate_ = arena.allocate<A>(p.gate.given ? stride : 0);
        if (!fills || !norm_) return;
        widen(address<T>(p.norm_weight, 0, 0, 0), p.norm_weight.channel, p.inputs, norm_weight_);
        fill(norm_bias_, p.inputs, A(0));
        if (p.norm_bias.given) widen(address<T>(p.norm_bias, 0, 0, 0), p.norm_bias.channel, p.inputs, norm_bias_);
    }

    // act(norm(x)) * gate of token t, the i-th of its block.
    void forward(int64_t t, int64_t i, A* to) const {
        read(p.x, t, to);
        if (norm_) {
            measure(to, i);
            normalize(to, i);
        }
        if (active_) activate(p.activation, to, p.inputs);
        if (!p.gate.given) return;
        read(p.gate, t, gate_);
        for (int64_t e = 0; e < p.inputs; ++e) to[e] *= gate_[e];
    }

    // Takes `grad`, the gradient of the prologue of token t, whose forward was the last of this block, to the gradients
    // of x and gate, and adds those of the norm's weight and bias.
    void backward(int64_t t, int64_t i, A* grad, A* grad_norm_weight, A* grad_norm_bias) const {
        read(p.x, t, value_);
        if (norm_) normalize(value_, i);
        if (p.gate.given) {
            read(p.gate, t, gate_);
            A* kept = gate_;  // becomes the gate's gradient, but for the factor act(norm(x))
            for (int64_t e = 0; e < p.inputs; ++e) {
                const A g = grad[e];
                grad[e] = g * kept[e];
                kept[e] = g;
            }
        }
        if (active_) activate_with_grads(p.activation, value_, grad, p.inputs);
        if (p.gate.given) {
            for (int64_t e = 0; e < p.inputs; ++e) gate_[e] *= value_[e];
            write(gate_, p.grad_gate, t);
        }
        if (norm_) norm_backward(t, i, grad, grad_norm_weight, grad_norm_bias);
        write(grad, p.grad_x, t);
    }

  private:
    static bool aligned(const RowTensor& x) {
        return reinterpret_cast<uintptr_t>(x.data) % (static_cast<size_t>(kLanes<A>) * sizeof(T)) == 0;
    }

    void read(const RowTensor& x, int64_t t, A* to) const { widen(address<T>(x, 0, t, 0), x.channel, p.inputs, to); }

    void write(const A* from, const RowTensor& x, int64_t t) const {
        T* to = address<T>(x, 0, t, 0);
        if (!streams_) return narrow(from, p.inputs, to);
        int64_t e = 0;
        for (; e + kLanes<A> <= p.inputs; e += kLanes<A>) stream_wide(to + e, load_vector(from + e));
        for (; e < p.inputs; ++e) store(to[e], from[e]);
    }

    // Mean and inverse standard deviation of a token.
    void measure(const A* x, int64_t i) const {
        const A size = static_cast<A>(p.inputs);
        const A mean = sum_over<A>(
                           p.inputs, [&](int64_t e) { return load_vector(x + e); }, [&](int64_t e) { return x[e]; }) /
                       size;
        const A variance = sum_over<A>(
                               p.inputs,
                               [&](int64_t e) {
                                   const Vector<A> d = load_vector(x + e) - mean;
                                   return d * d;
                               },
                               [&](int64_t e) { return (x[e] - mean) * (x[e] - mean); }) /
                           size;
        means_[i] = mean;
        scales_[i] = A(1) / square_root<A>(variance + static_cast<A>(p.eps));
    }

    void normalize(A* x, int64_t i) const {
        const A mean = means_[i], scale = scales_[i];
        for (int64_t e = 0; e < p.inputs; ++e) x[e] = (x[e] - mean) * scale * norm_weight_[e] + norm_bias_[e];
    }

    // `grad`, of norm(x), becomes that of x: scale * (g - mean(g) - z mean(g z)) with z = (x - mean) scale, g = grad w.
    void norm_backward(int64_t t, int64_t i, A* grad, A* grad_norm_weight, A* grad_norm_bias) const {
        const A mean = means_[i], scale = scales_[i];
        A* z = value_;
        read(p.x, t, z);
        for (int64_t e = 0; e < p.inputs; ++e) {
            z[e] = (z[e] - mean) * scale;
            grad_norm_weight[e] += grad[e] * z[e];
            grad_norm_bias[e] += grad[e];
            grad[e] *= norm_weight_[e];
        }
        const A size = static_cast<A>(p.inputs);
        const A of_grad =
            sum_over<A>(
                p.inputs, [&](int64_t e) { return load_vector(grad + e); }, [&](int64_t e) { return grad[e]; }) /
            size;
        const A of_product = sum_over<A>(
                                 p.inputs, [&](int64_t e) { return load_vector(grad + e) * load_vector(z + e); },
                                 [&](int64_t e) { return grad[e] * z[e]; }) /
                             size;
        for (int64_t e = 0; e < p.inputs; ++e) grad[e] = (grad[e] - of_grad - z[e] * of_product) * scale;
    }

    const LinearProblem& p;
    bool norm_, active_, streams_;
    A *norm_weight_, *norm_bias_, *means_, *scales_, *value_, *gate_;
};

INTERFORMER_ISA_END
