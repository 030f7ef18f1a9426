// A call of `personalized_ffn`, the same for every backend, and its checks.
#pragma once

#include <optional>

#include "common/activation_names.h"
#include "common/checks.h"
#include "common/tensor_view.h"

namespace interformer {

struct FfnInputs {
    TensorView x;                    // [T, E]
    TensorView weight;               // [B, E, F]
    TensorView offsets;              // [B + 1]
    std::optional<TensorView> bias;  // [B, F]
    Activation activation;
};

struct FfnOutputs {
    std::optional<TensorView> residual;  // [T, F], read
    TensorView out;                      // [T, F]
};

struct FfnGradients {
    TensorView grad_out;                  // [T, F], read
    TensorView grad_x, grad_weight;       // shaped like x and weight
    std::optional<TensorView> grad_bias;  // shaped like bias
};

template <typename Reader>
void read(Reader& next, FfnInputs& in) {
    next.tensor("x", in.x);
    next.tensor("weight", in.weight);
    next.tensor("offsets", in.offsets);
    next.optional("bias", in.bias);
    in.activation = next.choice("activation", parse_activation);
}

template <typename Reader>
void read(Reader& next, FfnOutputs& outputs) {
    next.optional("residual", outputs.residual);
    next.tensor("out", outputs.out);
}

template <typename Reader>
void read(Reader& next, FfnGradients& grads) {
    next.tensor("grad_out", grads.grad_out);
    next.tensor("grad_x", grads.grad_x);
    next.tensor("grad_weight", grads.grad_weight);
    next.optional("grad_bias", grads.grad_bias);
}

void check_forward(const Checks& check, const FfnInputs& in, const FfnOutputs& outputs);
void check_backward(const Checks& check, const FfnInputs& in, const FfnGradients& grads);

}  // namespace interformer
