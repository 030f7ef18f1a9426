// A call of `personalized_ffn`, as every backend takes it, and what is checked of it.
#pragma once

#include <optional>

#include "common/checks.h"
#include "common/scalar_maps.h"
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
    TensorView grad_x, grad_weight;       // of x's and weight's shapes
    std::optional<TensorView> grad_bias;  // of bias's
};

void check_forward(const Checks& check, const FfnInputs& in, const FfnOutputs& to);
void check_backward(const Checks& check, const FfnInputs& in, const FfnGradients& grads);

}  // namespace interformer
