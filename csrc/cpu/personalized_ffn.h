// `personalized_ffn` of docs/ops.md on the CPU: y_t = act(x_t W_b + bias_b) (+ residual_t) for every token t of row b.
#pragma once

#include <cstdint>

#include "common/ffn_call.h"

namespace interformer {

void personalized_ffn_forward(const FfnInputs& in, const FfnOutputs& outputs, int64_t threads);
void personalized_ffn_backward(const FfnInputs& in, const FfnGradients& grads, int64_t threads);

}  // namespace interformer
