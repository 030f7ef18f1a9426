// The ops of the attention family on the CPU: OPS.md's `jagged_attention`, `gated_cross_attention` and `pma_pooling`
// are one computation in three layouts of the queries and of what has the output's shape.
#pragma once

#include <cstdint>
#include <optional>

#include "common/tensor_view.h"
#include "cpu/scalar_maps.h"

namespace interformer {

// Where a row's queries are: packed `[Tq, H, D]` with offsets of their own (or the keys'), dense `[B, N, H, D]`, or
// `[M, H, D]` shared by all rows. Outputs are `[Tq, H, Dv]`, `[B, N, H, Dv]` and `[B, M, H, Dv]`.
enum class QueryLayout { packed, dense, shared };

QueryLayout parse_query_layout(const std::string& name);

// What forward and backward both read. Floating tensors share one dtype, but for the float32 tables.
struct AttentionInputs {
    QueryLayout layout;
    TensorView q, k;
    std::optional<TensorView> v;          // [Tk, Hk, Dv]; none: v is k
    std::optional<TensorView> q_offsets;  // of packed queries; none: the keys'
    TensorView kv_offsets;
    int64_t skip_prefix;  // keys left out at the start of each row
    std::optional<TensorView> cos, sin, positions_q, positions_k;
    bool rope_interleaved;
    bool causal;
    int64_t window_left, window_right, num_prefix;
    std::optional<TensorView> gate;  // of the output's shape, expanded
    double scale, post_scale;
    Score score;
    Gate gating;
};

struct AttentionOutputs {
    std::optional<TensorView> residual;  // read
    TensorView out;
    std::optional<TensorView> lse;       // in the type of accumulation, softmax only
    std::optional<TensorView> attended;  // the ungated A
};

struct AttentionGradients {
    TensorView grad_out;                 // read
    std::optional<TensorView> attended;  // the ungated A, read; only a gate needs it
    TensorView grad_q, grad_k;           // grad_k holds v's share where v is k
    std::optional<TensorView> grad_v;
    std::optional<TensorView> grad_gate;  // of the output's rank: summed over the axes of size 1
};

// A row's bits depend on the row alone, and no bits on the number of threads: sums over rows (of shared queries'
// gradients and of broadcast gates') are taken over runs of rows that the offsets fix, in their order.
void attention_forward(const AttentionInputs& in, const AttentionOutputs& to, int64_t threads);
void attention_backward(const AttentionInputs& in, const AttentionGradients& grads, int64_t threads);

}  // namespace interformer
