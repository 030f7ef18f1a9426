#include "common/activation_names.h"

#include <cstddef>
#include <stdexcept>
#include <string>

namespace interformer {

namespace {

template <size_t N>
Activation parse_name(const char* argument, const NamedActivation (&table)[N], const std::string& name) {
    std::string names;
    for (size_t i = 0; i < N; ++i) {
        if (name == table[i].name) return table[i].activation;
        names += std::string(i == 0 ? "" : i + 1 < N ? ", " : " or ") + table[i].name;
    }
    throw std::invalid_argument(std::string(argument) + " must be " + names + ", found " + name);
}

}  // namespace

Activation parse_activation(const std::string& name) {
    return parse_name("activation", kScoreActivations, name);
}

Score parse_score(const std::string& name) {
    if (name == "softmax") return {true, Activation::identity};
    return {false, parse_activation(name)};
}

bool parse_gate_form(const std::string& form) {
    if (form == "multiply") return false;
    if (form == "self") return true;
    throw std::invalid_argument("gate_form must be multiply or self, found " + form);
}

Activation parse_gate_activation(const std::string& name) {
    return parse_name("gate_activation", kGateActivations, name);
}

}  // namespace interformer
