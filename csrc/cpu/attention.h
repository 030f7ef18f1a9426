// The attention family of docs/ops.md on the CPU: `jagged_attention`, `gated_cross_attention` and `pma_pooling` are one
// computation in three layouts of the queries and of all tensors of the output's shape.
#pragma once

#include <cstdint>

#include "common/attention_call.h"

namespace interformer {

// A row's bits depend on the row alone, and no bits depend on the number of threads: sums over rows (the gradients of
// shared queries and of broadcast gates) are made over row groups that follow from the offsets, in their order.
void attention_forward(const AttentionInputs& in, const AttentionOutputs& outputs, int64_t threads);
void attention_backward(const AttentionInputs& in, const AttentionGradients& grads, int64_t threads);

}  // namespace interformer
