// Scores, gates and their activations by name, for all backends. The functions are in cpu/kernels/activations.h and
// cuda/maps.cuh.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

namespace interformer {

enum class Activation { identity, relu, silu, gelu, sigmoid, tanh };

struct NamedActivation {
    const char* name;
    Activation activation;
};

// The pointwise scores, which are the activations of `personalized_ffn`, too. A new one is a line here, with its value
// in `Activation`, and its functions in each backend.
constexpr NamedActivation kScoreActivations[] = {{"identity", Activation::identity},
                                                 {"relu", Activation::relu},
                                                 {"silu", Activation::silu},
                                                 {"gelu", Activation::gelu}};
constexpr NamedActivation kGateActivations[] = {{"sigmoid", Activation::sigmoid},
                                                {"tanh", Activation::tanh},
                                                {"silu", Activation::silu},
                                                {"identity", Activation::identity}};

// How scores become probabilities: by the softmax over a row, or one by one.
struct Score {
    bool softmax;
    Activation activation;  // not used by softmax
};

// G(A, gate): `A * act(gate)`, or `act(A * gate)` where the gate is inside.
struct Gate {
    bool inside;
    Activation activation;
};

template <size_t N>
Activation parse_name(const char* argument, const NamedActivation (&table)[N], const std::string& name) {
    std::string names;
    for (size_t i = 0; i < N; ++i) {
        if (name == table[i].name) return table[i].activation;
        names += std::string(i == 0 ? "" : i + 1 < N ? ", " : " or ") + table[i].name;
    }
    throw std::invalid_argument(std::string(argument) + " must be " + names + ", found " + name);
}

inline Activation parse_activation(const std::string& name) {
    return parse_name("activation", kScoreActivations, name);
}

inline Score parse_score(const std::string& name) {
    if (name == "softmax") return {true, Activation::identity};
    return {false, parse_activation(name)};
}

// Whether the gate is inside the activation.
inline bool parse_gate_form(const std::string& form) {
    if (form == "multiply") return false;
    if (form == "self") return true;
    throw std::invalid_argument("gate_form must be multiply or self, found " + form);
}

inline Activation parse_gate_activation(const std::string& name) {
    return parse_name("gate_activation", kGateActivations, name);
}

}  // namespace interformer
