// Activations with their gradients, and the gates made of them, as loops that become vector code.
#pragma once

#include "common/activation_names.h"
#include "cpu/kernels/elementary.h"

INTERFORMER_ISA_BEGIN

// Calls `each(i, value, grad)` for all i with the chosen activation: its value and its gradient (first derivative) as
// functions of a number. There is one loop for each name, so that the choice is made once and not for every number, and
// its functions are always inlined, so that it becomes vector code. The compiler warns of a name without a case.
template <typename A, typename Each>
inline void for_each_with(Activation name, int64_t count, Each&& each) {
    switch (name) {
        case Activation::identity:
            for (int64_t i = 0; i < count; ++i)
                each(i, [](A x) INTERFORMER_LAMBDA { return x; }, [](A) INTERFORMER_LAMBDA { return A(1); });
            return;
        case Activation::relu:
            for (int64_t i = 0; i < count; ++i)
                each(
                    i, [](A x) INTERFORMER_LAMBDA { return x <= A(0) ? A(0) : x; },
                    [](A x) INTERFORMER_LAMBDA { return x <= A(0) ? A(0) : A(1); });
            return;
        case Activation::silu:
            for (int64_t i = 0; i < count; ++i)
                each(
                    i, [](A x) INTERFORMER_LAMBDA { return x * sigmoid(x); },
                    [](A x) INTERFORMER_LAMBDA {
                        const A s = sigmoid(x);
                        return s * (A(1) + x * (A(1) - s));
                    });
            return;
        case Activation::gelu:
            for (int64_t i = 0; i < count; ++i)
                each(
                    i, [](A x) INTERFORMER_LAMBDA { return x * normal_distribution(x); },
                    [](A x) INTERFORMER_LAMBDA { return normal_distribution(x) + x * normal_density(x); });
            return;
        case Activation::sigmoid:
            for (int64_t i = 0; i < count; ++i)
                each(
                    i, [](A x) INTERFORMER_LAMBDA { return sigmoid(x); },
                    [](A x) INTERFORMER_LAMBDA {
                        const A s = sigmoid(x);
                        return s * (A(1) - s);
                    });
            return;
        case Activation::tanh:
            for (int64_t i = 0; i < count; ++i)
                each(
                    i, [](A x) INTERFORMER_LAMBDA { return hyperbolic_tangent(x); },
                    [](A x) INTERFORMER_LAMBDA {
                        const A t = hyperbolic_tangent(x);
                        return A(1) - t * t;
                    });
            return;
    }
}

// x becomes factor * act(scale x).
template <typename A>
inline void activate(Activation name, A* x, int64_t count, A scale = 1, A factor = 1) {
    for_each_with<A>(name, count, [=](int64_t i, auto value, auto) { x[i] = value(scale * x[i]) * factor; });
}

// x becomes act(scale x); `grads` are multiplied by its derivative. Where the derivative of relu is 0 they become 0,
// even if they are infinite.
template <typename A>
inline void activate_with_grads(Activation name, A* x, A* grads, int64_t count, A scale = 1) {
    if (name == Activation::relu) {
        for (int64_t i = 0; i < count; ++i) {
            const A inner = scale * x[i];
            grads[i] = inner <= A(0) ? A(0) : grads[i] * scale;
            x[i] = inner <= A(0) ? A(0) : inner;
        }
        return;
    }
    for_each_with<A>(name, count, [=](int64_t i, auto value, auto grad_of) {
        const A inner = scale * x[i];
        grads[i] *= grad_of(inner) * scale;
        x[i] = value(inner);
    });
}

// a becomes G(a, gate).
template <typename A>
inline void apply_gate(const Gate& gating, A* a, const A* gate, int64_t count) {
    if (gating.inside)
        for_each_with<A>(gating.activation, count, [=](int64_t i, auto value, auto) { a[i] = value(a[i] * gate[i]); });
    else
        for_each_with<A>(gating.activation, count, [=](int64_t i, auto value, auto) { a[i] = a[i] * value(gate[i]); });
}

// `grad`, the gradient of G(a, gate), becomes that of a; `gate` becomes the gate's gradient.
template <typename A>
inline void gate_backward(const Gate& gating, const A* a, A* gate, A* grad, int64_t count) {
    if (gating.inside)
        for_each_with<A>(gating.activation, count, [=](int64_t i, auto, auto grad_of) {
            const A inner = grad[i] * grad_of(a[i] * gate[i]), grad_a = inner * gate[i];
            gate[i] = inner * a[i];
            grad[i] = grad_a;
        });
    else
        for_each_with<A>(gating.activation, count, [=](int64_t i, auto value, auto grad_of) {
            const A grad_a = grad[i] * value(gate[i]);
            gate[i] = grad[i] * a[i] * grad_of(gate[i]);
            grad[i] = grad_a;
        });
}

INTERFORMER_ISA_END
