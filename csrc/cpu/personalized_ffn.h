// OPS.md's `personalized_ffn` on the CPU: y_t = act(x_t W_b + bias_b) (+ residual_t) for every token t of row b.
#pragma once

#include <cstdint>
#include <optional>

#include "common/tensor_view.h"
#include "cpu/scalar_maps.h"

namespace interformer {

struct FfnInputs {
    TensorView x;                    // [T, E]
    TensorView weight;               // [B, E, F]
    TensorView offsets;              // [B + 1]
    std::optional<TensorView> bias;  // [B, F]
    Activation activation;
};

struct FfnGradients {
    TensorView grad_out;                  // [T, F], read
    TensorView grad_x, grad_weight;       // of x's and weight's shapes
    std::optional<TensorView> grad_bias;  // of bias's
};

void personalized_ffn_forward(const FfnInputs& in, const std::optional<TensorView>& residual, const TensorView& out,
                              int64_t threads);
void personalized_ffn_backward(const FfnInputs& in, const FfnGradients& grads, int64_t threads);

}  // namespace interformer
