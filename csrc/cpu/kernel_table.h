// The table of kernels for one element type, compiled for one instruction set, and the problems they solve.
#pragma once

#include <cstdint>

#include "common/activation_names.h"
#include "cpu/attention_problem.h"
#include "cpu/row_tensor.h"

namespace interformer {

// `personalized_ffn` of docs/ops.md: y_t = act(x_t W_b + bias_b) (+ residual_t). Tensors of tokens are [T, 1 head,
// channels].
struct FfnProblem {
    int64_t inputs = 0, outputs = 0;  // E, F
    const int64_t* begins = nullptr;
    const int64_t* counts = nullptr;
    RowTensor x, residual, out;
    RowTensor weight, bias;  // [B, E, F] as rows of "tokens" E, and [B, F] as rows of one token
    Activation activation = Activation::identity;
    bool stream = false;  // the outputs exceed the caches

    // Backward.
    RowTensor grad_out, grad_x, grad_weight, grad_bias;
};

// `apply_rotary` of docs/ops.md, or its inverse (`backwards`).
struct RotaryProblem {
    int64_t heads = 0, head_size = 0;
    const int64_t* begins = nullptr;
    const int64_t* counts = nullptr;
    RowTensor x, out;
    RotaryTables rope;
    Positions positions;
    bool backwards = false;
};

// `pma_pooling` of projected tokens without projecting each token (docs/ops.md, folded projections):
//
//     out[b, m, h] = (sum over t of P(<seeds[m, h], W_k[h] x_t>) x_t) W_v[h]' + bias[h]
//
// `pooling` is attention over the raw tokens x [T, 1 head, E], under softmax and without masks: each row's M x H
// queries are the folded seeds.
struct FoldedProblem {
    AttentionProblem pooling;
    int64_t head_size = 0;               // D, of a projected head
    RowTensor seeds;                     // [M, H, D], as rows' shared queries
    RowTensor key_weight, value_weight;  // [H, D, E]: a head is a head, one of its D rows a token
    RowTensor value_bias;                // [H, D], if given
    RowTensor out;                       // [B, M, H, D]
    RowTensor pooled;                    // [B, M, H, E], if given: the sums before W_v
};

// `jagged_softmax` of docs/ops.md. Tensors are [T, heads, 1 channel], their heads side by side.
struct SoftmaxProblem {
    int64_t heads = 0;
    const int64_t* counts = nullptr;
    RowTensor scores, grad_out;
    RowTensor out;  // written: the output or, backwards, the gradient of the scores
};

// `jagged_weighted_sum` of docs/ops.md. Weights are [T, heads, 1 channel], `out` or its gradient [B, 1 token, heads,
// channels]; channels lie side by side, and so do the heads of weights.
struct WeightedSumProblem {
    int64_t heads = 0, channels = 0;
    const int64_t* counts = nullptr;
    RowTensor weights, v, out, grad_weights, grad_v;
    bool stream = false;  // grad_v exceeds the caches
};

// A task of attention: the rows [first_row, last_row) of one row group under the key/value heads [first_head,
// last_head). A row with too much work for one thread is sharded: each of its tasks takes one shard of its queries, and
// the backward sums the gradients of the row's keys over the shards in `key_grads`.
struct AttentionTask {
    int64_t first_row, last_row, first_head, last_head;
    int64_t shard = -1;  // -1: all queries
    void* key_grads = nullptr;
    int64_t sharded_row = -1;  // index among the sharded rows and heads
};

// A task of the other ops is the rows [first, last). The caller provides the memory of a thread, as many bytes as
// `..._memory` returns.
struct Kernels {
    int64_t (*attention_forward_memory)(const AttentionProblem&);
    int64_t (*attention_backward_memory)(const AttentionProblem&);
    void (*attention_forward)(const AttentionProblem&, const AttentionTask&, void* memory);
    void (*attention_backward)(const AttentionProblem&, const AttentionTask&, void* memory);
    // The number of shards of a row, and the bytes of its `key_grads`. After the backward of a shard,
    // `attention_add_shard` adds its gradients, which lie in the thread's memory, to `key_grads`. Shards are added in
    // their order; the last one writes the sums to the output.
    int64_t (*attention_shards)(const AttentionProblem&, int64_t row);
    int64_t (*attention_key_grads_bytes)(const AttentionProblem&, int64_t row);
    void (*attention_add_shard)(const AttentionProblem&, const AttentionTask&, void* memory);
    // All threads read memory of so many bytes, which is made once for a call; then tasks are the rows [first, last).
    int64_t (*folded_shared_memory)(const FoldedProblem&);
    void (*folded_prepare)(const FoldedProblem&, void* shared);
    int64_t (*folded_memory)(const FoldedProblem&);
    void (*folded_forward)(const FoldedProblem&, const void* shared, int64_t first, int64_t last, void* memory);
    int64_t (*ffn_memory)(const FfnProblem&);
    void (*ffn_forward)(const FfnProblem&, int64_t first, int64_t last, void* memory);
    void (*ffn_backward)(const FfnProblem&, int64_t first, int64_t last, void* memory);
    int64_t (*rotary_memory)(const RotaryProblem&);
    void (*rotary)(const RotaryProblem&, int64_t first, int64_t last, void* memory);
    int64_t (*softmax_memory)(const SoftmaxProblem&);
    void (*softmax_forward)(const SoftmaxProblem&, int64_t first, int64_t last, void* memory);
    void (*softmax_backward)(const SoftmaxProblem&, int64_t first, int64_t last, void* memory);
    int64_t (*weighted_sum_memory)(const WeightedSumProblem&);
    void (*weighted_sum_forward)(const WeightedSumProblem&, int64_t first, int64_t last, void* memory);
    void (*weighted_sum_backward)(const WeightedSumProblem&, int64_t first, int64_t last, void* memory);
};

}  // namespace interformer
