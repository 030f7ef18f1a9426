// The scalar maps of the operations by name: scores, gates, and what both draw from. What they compute is in
// kernels/scalar_maps.h.
#pragma once

#include <stdexcept>
#include <string>

namespace interformer {

enum class Activation { identity, relu, silu, gelu, sigmoid, tanh };

// How scores become weights: by the softmax over a row, or one by one.
struct Score {
    bool softmax;
    Activation activation;  // where it is not softmax
};

// G(A, gate): `A * act(gate)`, or, where the gate is inside, `act(A * gate)`.
struct Gate {
    bool inside;
    Activation activation;
};

inline Activation parse_activation(const std::string& name) {
    if (name == "identity") return Activation::identity;
    if (name == "relu") return Activation::relu;
    if (name == "silu") return Activation::silu;
    if (name == "gelu") return Activation::gelu;
    throw std::invalid_argument("activation must be identity, relu, silu or gelu, found " + name);
}

inline Score parse_score(const std::string& name) {
    if (name == "softmax") return {true, Activation::identity};
    return {false, parse_activation(name)};
}

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
