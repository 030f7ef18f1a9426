// A call of `fused_linear`, the same for every backend, and its checks.
#pragma once

#include <optional>
#include <string>

#include "common/activation_names.h"
#include "common/checks.h"
#include "common/tensor_view.h"

namespace interformer {

struct LinearInputs {
    TensorView x;                                      // [T, E]
    TensorView weight;                                 // [F, E]
    std::optional<TensorView> bias;                    // [F]
    std::optional<TensorView> norm_weight, norm_bias;  // [E]
    std::optional<TensorView> gate;                    // [T, E]
    double eps;
    Activation activation;
};

struct LinearOutputs {
    std::optional<TensorView> residual;  // [T, F], read
    TensorView out;                      // [T, F]
};

struct LinearGradients {
    TensorView grad_out;             // [T, F], read
    TensorView grad_x, grad_weight;  // shaped like the inputs, as the others are
    std::optional<TensorView> grad_bias, grad_norm_weight, grad_norm_bias, grad_gate;
};

template <typename Reader>
void read(Reader& next, LinearInputs& in) {
    next.tensor("x", in.x);
    next.tensor("weight", in.weight);
    next.optional("bias", in.bias);
    next.optional("norm_weight", in.norm_weight);
    next.optional("norm_bias", in.norm_bias);
    next.optional("gate", in.gate);
    in.eps = next.number("eps");
    in.activation = next.choice("activation", parse_activation);
}

template <typename Reader>
void read(Reader& next, LinearOutputs& outputs) {
    next.optional("residual", outputs.residual);
    next.tensor("out", outputs.out);
}

template <typename Reader>
void read(Reader& next, LinearGradients& grads) {
    next.tensor("grad_out", grads.grad_out);
    next.tensor("grad_x", grads.grad_x);
    next.tensor("grad_weight", grads.grad_weight);
    next.optional("grad_bias", grads.grad_bias);
    next.optional("grad_norm_weight", grads.grad_norm_weight);
    next.optional("grad_norm_bias", grads.grad_norm_bias);
    next.optional("grad_gate", grads.grad_gate);
}

inline void check_linear(const Checks& check, const LinearInputs& in) {
    const DType dtype = in.x.dtype;
    check.floating("x", in.x);
    check.tensor("x", in.x, dtype, {{"T"}, {"E"}});
    const int64_t E = in.x.shape[1];
    check.tensor("weight", in.weight, dtype, {{"F"}, {"E", E}});
    if (in.bias) check.tensor("bias", *in.bias, dtype, {{"F", in.weight.shape[0]}});
    if (in.norm_weight) check.tensor("norm_weight", *in.norm_weight, dtype, {{"E", E}});
    if (in.norm_bias) check.tensor("norm_bias", *in.norm_bias, dtype, {{"E", E}});
    if (in.norm_bias && !in.norm_weight) check.refuse("norm_weight", "given with norm_bias", "None");
    if (!(in.eps >= 0)) check.refuse("eps", "at least 0", std::to_string(in.eps));
    if (in.gate) check.tensor("gate", *in.gate, dtype, {{"T", in.x.shape[0]}, {"E", E}});
}

inline void check_forward(const Checks& check, const LinearInputs& in, const LinearOutputs& outputs) {
    check_linear(check, in);
    const int64_t tokens = in.x.shape[0], F = in.weight.shape[0];
    check.tensor("out", outputs.out, in.x.dtype, {{"T", tokens}, {"F", F}});
    check.contiguous("out", outputs.out);
    if (outputs.residual) check.tensor("residual", *outputs.residual, in.x.dtype, {{"T", tokens}, {"F", F}});
}

inline void check_backward(const Checks& check, const LinearInputs& in, const LinearGradients& grads) {
    check_linear(check, in);
    check.tensor("grad_out", grads.grad_out, in.x.dtype, {{"T", in.x.shape[0]}, {"F", in.weight.shape[0]}});
    check.gradient("grad_x", grads.grad_x, "x", in.x);
    check.gradient("grad_weight", grads.grad_weight, "weight", in.weight);
    const auto optional = [&](const char* argument, const std::optional<TensorView>& grad, const char* name,
                              const std::optional<TensorView>& input) {
        if (input.has_value() != grad.has_value())
            check.refuse(argument, input ? "given" : "None", grad ? describe(*grad) : "None");
        if (input) check.gradient(argument, *grad, name, *input);
    };
    optional("grad_bias", grads.grad_bias, "bias", in.bias);
    optional("grad_norm_weight", grads.grad_norm_weight, "norm_weight", in.norm_weight);
    optional("grad_norm_bias", grads.grad_norm_bias, "norm_bias", in.norm_bias);
    optional("grad_gate", grads.grad_gate, "gate", in.gate);
}

}  // namespace interformer
