// `fused_linear` of docs/ops.md on the CPU: y = (act(norm(x)) * gate) W' + bias (+ residual) for every token.
#pragma once

#include <cstdint>

#include "common/linear_call.h"

namespace interformer {

void fused_linear_forward(const LinearInputs& in, const LinearOutputs& outputs, int64_t threads);
void fused_linear_backward(const LinearInputs& in, const LinearGradients& grads, int64_t threads);

}  // namespace interformer
