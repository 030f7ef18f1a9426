// The attention family of docs/ops.md on a GPU: `jagged_attention`, `gated_cross_attention` and `pma_pooling` are one
// computation in three layouts.
#pragma once

#include <cstdint>
#include <optional>

#include "common/attention_call.h"
#include "cuda/stream.h"

namespace interformer {
namespace cuda {

constexpr int kMaxChannels = 256;        // channels of a head
constexpr int kWidestRope = 64;          // channels of a head whose queries and keys these kernels rotate
constexpr int64_t kSchedulerSize = 258;  // int64 numbers of memory, of any content, that a tile scheduler needs

// Memory for the partials of split rows: rows of more keys than `split_kv` (a multiple of 32), where queries are not
// packed. All float32.
struct SplitKv {
    int64_t split_kv = 0;  // 0: no row is split
    // Sums over channels, [2 Tk / split_kv + 1, N, H, Dv]; in the backward [.., D], and for dense queries alone.
    std::optional<TensorView> partials;
    // Two statistics of a softmax, [2 Tk / split_kv + 1, N, H, 2]; also there for pointwise scores in the forward.
    std::optional<TensorView> partial_stats;
};

// The inputs that the kernels of a call with rotary tables rotate themselves. Others were rotated before
// (`apply_rotary`), with the same bits. Gradients of both are always rotated back by the kernels.
struct RotatedInside {
    bool queries = false, keys = false;
};

struct ForwardWorkspace {
    RotatedInside rotated;
    SplitKv splits;
    TensorView scheduler;  // `kSchedulerSize` int64 numbers of any content
};

// Tensors with a number for each query are float32, of the output's shape without its last axis, and present only under
// softmax.
struct BackwardWorkspace {
    RotatedInside rotated;
    std::optional<TensorView> lse;                 // from the forward, read
    std::optional<TensorView> delta, inv_row_sum;  // see attention_gradient.cuh
    // The gradient of A, of the output's shape and dtype; present only with a gate, or a factor of probabilities.
    std::optional<TensorView> grad_attn_out;
    // Sums of workers for the gradients of sinks, [workers, H, 1], and of bias tables, [workers, H, entries]; float32.
    std::optional<TensorView> sink_sums, position_sums, time_sums;
    int64_t gate_block;  // tokens that a broadcast gate's gradient is summed over; 1: it is not
    int64_t key_shards;  // shards of a row's keys that gradients of shared queries are summed over; else 1
    SplitKv splits;
    TensorView scheduler;  // as in the forward
};

template <typename Reader>
void read(Reader& next, SplitKv& splits) {
    splits.split_kv = next.integer("split_kv");
    next.optional("partials", splits.partials);
    next.optional("partial_stats", splits.partial_stats);
}

template <typename Reader>
void read(Reader& next, RotatedInside& rotated) {
    rotated.queries = next.boolean("rotates_queries");
    rotated.keys = next.boolean("rotates_keys");
}

template <typename Reader>
void read(Reader& next, ForwardWorkspace& workspace) {
    read(next, workspace.rotated);
    read(next, workspace.splits);
    next.tensor("scheduler", workspace.scheduler);
}

template <typename Reader>
void read(Reader& next, BackwardWorkspace& workspace) {
    read(next, workspace.rotated);
    next.optional("lse", workspace.lse);
    next.optional("delta", workspace.delta);
    next.optional("inv_row_sum", workspace.inv_row_sum);
    next.optional("grad_attn_out", workspace.grad_attn_out);
    next.optional("sink_sums", workspace.sink_sums);
    next.optional("position_sums", workspace.position_sums);
    next.optional("time_sums", workspace.time_sums);
    workspace.gate_block = next.integer("gate_block");
    workspace.key_shards = next.integer("key_shards");
    read(next, workspace.splits);
    next.tensor("scheduler", workspace.scheduler);
}

// `tf32`: float32 may be multiplied by tensor cores.
void attention_forward(const AttentionInputs& in, const AttentionOutputs& to, const ForwardWorkspace& workspace,
                       bool tf32, const Stream& stream);

// `grad_q` of shared queries is float32 [row_groups * key_shards, M, H, D]: sums over groups of equally many rows (the
// last group may have fewer) and over shards of their keys.
// `grad_gate` has the gate's dtype and the output's shape. Where it is summed it is float32, with a last axis of 1 if
// summed over channels, and leading axes [blocks, 1 ...] if summed over blocks of `gate_block` tokens.
// `attn_out` is float32, and needed with a gate.
void attention_backward(const AttentionInputs& in, const AttentionGradients& grads, const BackwardWorkspace& workspace,
                        bool tf32, const Stream& stream);

// ---------------------------------------------------------------- parts of the two

void check_forward(const Checks& check, const AttentionInputs& in, const AttentionOutputs& to,
                   const ForwardWorkspace& workspace);
void check_backward(const Checks& check, const AttentionInputs& in, const AttentionGradients& grads,
                    const BackwardWorkspace& workspace);

// The arguments of the passes of a backward. `grad_attn_out` is the gradient of A: the workspace's, or `grad_out`.
struct Backward {
    const AttentionInputs& in;
    const AttentionGradients& grads;
    const BackwardWorkspace& workspace;
    const TensorView& grad_attn_out;
    bool tf32;
    const Stream& stream;
};

// Gradients through the gate and the factor of probabilities: writes `grad_attn_out` and `grad_gate` where the
// workspace has the former.
void epilogue_backward(const Backward& call);
// Delta and the inverse row sums of a softmax.
void query_stats_backward(const Backward& call);
// dQ.
void queries_backward(const Backward& call);
// dK and dV.
void keys_backward(const Backward& call);
// Gradients of sinks and bias tables.
void tables_backward(const Backward& call);

}  // namespace cuda
}  // namespace interformer
