// `jagged_weighted_sum` of docs/ops.md on a GPU.
#pragma once

#include "common/jagged_weighted_sum_call.h"
#include "cuda/stream.h"

namespace interformer {
namespace cuda {

void jagged_weighted_sum_forward(const WeightedSumInputs& in, const WeightedSumOutputs& outputs, const Stream& stream);
void jagged_weighted_sum_backward(const WeightedSumInputs& in, const WeightedSumGradients& grads, const Stream& stream);

}  // namespace cuda
}  // namespace interformer
