// The attention family of docs/ops.md on a GPU: `jagged_attention`, `gated_cross_attention` and `pma_pooling` are one
// computation in three layouts. Rotary embedding is a pass of its own before and after (`apply_rotary`).
#pragma once

#include <cstdint>
#include <optional>

#include "common/attention_call.h"
#include "cuda/stream.h"

namespace interformer {
namespace cuda {

constexpr int kMostChannels = 256;  // of a head

// Memory for sums over chunks of `split` keys (a multiple of 32), into which rows of more keys are cut; for queries
// that are not packed. All float32.
struct AttentionPieces {
    int64_t split = 0;  // 0: no row is cut
    // [2 Tk / split + 1, N, H, Dv], of the backward's dense queries [2 Tk / split + 1, N, H, D]; shared ones have none.
    std::optional<TensorView> sums;
    // [2 Tk / split + 1, N, H, 2], under softmax; also of pointwise scores in the forward.
    std::optional<TensorView> weights;
};

// What the backward has of each query: all but `grad_attn_out` are float32, of the output's shape without its last
// axis, and there just under softmax; all but `lse` are filled.
struct AttentionSides {
    std::optional<TensorView> lse;           // of the forward
    std::optional<TensorView> delta, share;  // see attention_gradient.cuh
    // Has the output's shape and dtype; present just where there is a gate, or a `post_scale` that is not 1.
    std::optional<TensorView> grad_attn_out;
};

// `queue` is memory of `kQueueSize` int64 numbers (queue.cuh); what it holds does not matter.
// `tf32`: float32 may be multiplied by tensor cores.
void attention_forward(const AttentionInputs& in, const AttentionOutputs& to, const AttentionPieces& pieces,
                       const TensorView& queue, bool tf32, const Stream& stream);

// `grad_q` of shared queries is float32 [runs * parts, M, H, D]: sums over runs of equally many rows (the last may have
// fewer), of a row's keys over as many parts; `parts` is 1 else.
// `grad_gate` is of the gate's dtype and the output's shape; or float32 of that shape, but for a last axis of 1 where
// it is summed over channels, and leading axes [blocks, 1 ...] where it is summed over blocks of `gate_block` tokens
// (1: not summed). `attn_out` is float32, and wanted with a gate.
void attention_backward(const AttentionInputs& in, const AttentionGradients& grads, const AttentionSides& sides,
                        int64_t gate_block, const AttentionPieces& pieces, int64_t parts, const TensorView& queue,
                        bool tf32, const Stream& stream);

// ---------------------------------------------------------------- parts of the two

void check_forward(const Checks& check, const AttentionInputs& in, const AttentionOutputs& to,
                   const AttentionPieces& pieces, const TensorView& queue);
void check_backward(const Checks& check, const AttentionInputs& in, const AttentionGradients& grads,
                    const AttentionSides& sides, int64_t gate_block, const AttentionPieces& pieces, int64_t parts,
                    const TensorView& queue);

// Writes the gradients behind a gate and `post_scale`: `grad_attn_out` and `grad_gate`.
void epilogue_backward(const AttentionInputs& in, const AttentionGradients& grads, const AttentionSides& sides,
                       int64_t gate_block, const Stream& stream);
// Delta and share under softmax, from `grad_attn_out`, the gradient of A.
void shares_backward(const AttentionInputs& in, const TensorView& grad_attn_out, const AttentionSides& sides,
                     const AttentionPieces& pieces, const TensorView& queue, bool tf32, const Stream& stream);
// dQ, and dK and dV, from the gradient of A, delta and share.
void queries_backward(const AttentionInputs& in, const TensorView& grad_attn_out, const AttentionGradients& grads,
                      const AttentionSides& sides, const AttentionPieces& pieces, int64_t parts,
                      const TensorView& queue, bool tf32, const Stream& stream);
void keys_backward(const AttentionInputs& in, const TensorView& grad_attn_out, const AttentionGradients& grads,
                   const AttentionSides& sides, const TensorView& queue, bool tf32, const Stream& stream);

}  // namespace cuda
}  // namespace interformer
