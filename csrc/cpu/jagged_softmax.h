// `jagged_softmax` of docs/ops.md on the CPU.
#pragma once

#include <cstdint>

#include "common/jagged_softmax_call.h"

namespace interformer {

void jagged_softmax_forward(const SoftmaxInputs& in, const SoftmaxOutputs& outputs, int64_t threads);
void jagged_softmax_backward(const SoftmaxInputs& in, const SoftmaxGradients& grads, int64_t threads);

}  // namespace interformer
