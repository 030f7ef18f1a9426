// `jagged_weighted_sum` of docs/ops.md on the CPU.
#pragma once

#include <cstdint>

#include "common/jagged_weighted_sum_call.h"

namespace interformer {

void jagged_weighted_sum_forward(const WeightedSumInputs& in, const WeightedSumOutputs& outputs, int64_t threads);
void jagged_weighted_sum_backward(const WeightedSumInputs& in, const WeightedSumGradients& grads, int64_t threads);

}  // namespace interformer
