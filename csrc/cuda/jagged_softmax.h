// `jagged_softmax` of docs/ops.md on a GPU.
#pragma once

#include "common/jagged_softmax_call.h"
#include "cuda/stream.h"

namespace interformer {
namespace cuda {

void jagged_softmax_forward(const SoftmaxInputs& in, const SoftmaxOutputs& outputs, const Stream& stream);
void jagged_softmax_backward(const SoftmaxInputs& in, const SoftmaxGradients& grads, const Stream& stream);

}  // namespace cuda
}  // namespace interformer
