// The scalar maps of the operations and their slopes: scores, gates, and what both draw from.
#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace interformer {

enum class Activation { identity, relu, silu, gelu, sigmoid, tanh };

// f(x) and f'(x).
template <typename A>
struct ValueAndSlope {
    A value;
    A slope;
};

template <typename A>
A sigmoid(A x) {
    return A(1) / (A(1) + std::exp(-x));
}

// Distribution and density of the standard normal law.
template <typename A>
A normal_distribution(A x) {
    return A(0.5) * (A(1) + std::erf(x * A(0.70710678118654752440)));
}
template <typename A>
A normal_density(A x) {
    return A(0.39894228040143267794) * std::exp(A(-0.5) * x * x);
}

template <typename A>
ValueAndSlope<A> activate_with_slope(Activation kind, A x) {
    switch (kind) {
        case Activation::relu:
            return {x <= A(0) ? A(0) : x, x <= A(0) ? A(0) : A(1)};  // NaN stays NaN
        case Activation::silu: {
            const A s = sigmoid(x);
            return {x * s, s * (A(1) + x * (A(1) - s))};
        }
        case Activation::gelu: {
            const A p = normal_distribution(x);
            return {x * p, p + x * normal_density(x)};
        }
        case Activation::sigmoid: {
            const A s = sigmoid(x);
            return {s, s * (A(1) - s)};
        }
        case Activation::tanh: {
            const A t = std::tanh(x);
            return {t, A(1) - t * t};
        }
        case Activation::identity:
            break;
    }
    return {x, A(1)};
}

template <typename A>
A activate(Activation kind, A x) {
    return activate_with_slope(kind, x).value;
}

// How scores become weights: by the softmax over a row, or one by one.
struct Score {
    bool softmax;
    Activation activation;  // where it is not softmax
};

inline Score parse_score(const std::string& name) {
    if (name == "softmax") return {true, Activation::identity};
    if (name == "identity") return {false, Activation::identity};
    if (name == "relu") return {false, Activation::relu};
    if (name == "silu") return {false, Activation::silu};
    if (name == "gelu") return {false, Activation::gelu};
    throw std::invalid_argument("score must be softmax, identity, relu, silu or gelu, found " + name);
}

// G(A, gate): `A * act(gate)`, or, where the gate is inside, `act(A * gate)`.
struct Gate {
    bool inside;
    Activation activation;

    template <typename A>
    A apply(A a, A gate) const {
        return inside ? activate(activation, a * gate) : a * activate(activation, gate);
    }

    // dG/dA and dG/dgate.
    template <typename A>
    void slopes(A a, A gate, A& to_a, A& to_gate) const {
        const ValueAndSlope<A> act = activate_with_slope(activation, inside ? a * gate : gate);
        to_a = inside ? act.slope * gate : act.value;
        to_gate = act.slope * a;
    }
};

inline Gate parse_gate(const std::string& form, const std::string& activation) {
    if (form != "multiply" && form != "self")
        throw std::invalid_argument("gate_form must be multiply or self, found " + form);
    const bool inside = form == "self";
    if (activation == "sigmoid") return {inside, Activation::sigmoid};
    if (activation == "tanh") return {inside, Activation::tanh};
    if (activation == "silu") return {inside, Activation::silu};
    if (activation == "identity") return {inside, Activation::identity};
    throw std::invalid_argument("gate_activation must be sigmoid, tanh, silu or identity, found " + activation);
}

}  // namespace interformer
