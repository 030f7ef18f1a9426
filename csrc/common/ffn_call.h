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

void check_forward(const Checks& check, const FfnInputs& in, const FfnOutputs& outputs);
void check_backward(const Checks& check, const FfnInputs& in, const FfnGradients& grads);

}  // namespace interformer
