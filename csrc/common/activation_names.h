// Scores, gates and their activations by name, for all backends. The functions are in cpu/kernels/activations.h and
// cuda/maps.cuh.
#pragma once

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

// Each throws for a name that is none of its own.
Activation parse_activation(const std::string& name);
Score parse_score(const std::string& name);
// Whether the gate is inside the activation.
bool parse_gate_form(const std::string& form);
Activation parse_gate_activation(const std::string& name);

}  // namespace interformer
