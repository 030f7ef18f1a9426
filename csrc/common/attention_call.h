// A call of the ops of the attention family, as every backend takes it, and what is checked of it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "common/checks.h"
#include "common/scalar_maps.h"
#include "common/tensor_view.h"

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
    std::optional<TensorView> attn_out;  // the ungated A, in the type of accumulation
};

struct AttentionGradients {
    TensorView grad_out;                 // read
    std::optional<TensorView> attn_out;  // the ungated A as the forward left it, read; only a gate needs it
    TensorView grad_q, grad_k;           // grad_k holds v's share where v is k
    std::optional<TensorView> grad_v;
    std::optional<TensorView> grad_gate;  // of the output's rank: summed over the axes of size 1
};

void check_inputs(const Checks& check, const AttentionInputs& in);
// Of the output's shape, but for its last axis: `last`, or none.
void check_like_output(const Checks& check, const AttentionInputs& in, const char* argument, const TensorView& x,
                       DType dtype, std::optional<Axis> last);
// The output's last axis.
Axis value_axis(const AttentionInputs& in);
// `given` is there just where `wanted` is.
void check_pair(const Checks& check, const char* argument, bool wanted, const std::optional<TensorView>& given);
void check_key_gradients(const Checks& check, const AttentionInputs& in, const AttentionGradients& grads);
void check_outputs(const Checks& check, const AttentionInputs& in, const AttentionOutputs& to);
void check_gradients(const Checks& check, const AttentionInputs& in, const AttentionGradients& grads);

}  // namespace interformer
