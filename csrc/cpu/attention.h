// The attention family of docs/ops.md on the CPU: `jagged_attention`, `gated_cross_attention` and `pma_pooling` are one
// computation in three layouts of the queries and of all tensors of the output's shape.
#pragma once

#include <cstdint>

#include "common/attention_call.h"

namespace interformer {

// A row's bits depend on the row alone, and no bits on the number of threads: sums over rows (of shared queries'
// gradients and of broadcast gates') are taken over runs of rows that the offsets fix, in their order.
void attention_forward(const AttentionInputs& in, const AttentionOutputs& to, int64_t threads);
void attention_backward(const AttentionInputs& in, const AttentionGradients& grads, int64_t threads);

}  // namespace interformer
