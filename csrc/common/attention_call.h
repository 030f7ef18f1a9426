// A call of attention, the same for every backend, and its checks.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "common/activation_names.h"
#include "common/attention_variant.h"
#include "common/checks.h"
#include "common/tensor_view.h"

namespace interformer {

// The layout of the queries: packed `[Tq, H, D]` with offsets of their own (or the keys'), dense `[B, N, H, D]`, or
// `[M, H, D]` shared by all rows. Outputs are `[Tq, H, Dv]`, `[B, N, H, Dv]` and `[B, M, H, Dv]`.
enum class QueryLayout { packed, dense, shared };

QueryLayout parse_query_layout(const std::string& name);

// The arguments that forward and backward share. Floating tensors have one dtype, except for the float32 tables.
struct AttentionInputs {
    QueryLayout layout;
    TensorView q, k;
    std::optional<TensorView> v;          // [Tk, Hk, Dv]; without it, v is k
    std::optional<TensorView> q_offsets;  // for packed queries; without it, the keys'
    TensorView kv_offsets;
    AttentionVariant variant;
    VariantTensors variant_tensors;
    int64_t skip_prefix;  // keys skipped at the start of each row
    std::optional<TensorView> cos, sin, positions_q, positions_k;
    bool rope_interleaved;
    std::optional<TensorView> gate;  // expanded to the output's shape
    Gate gating;
};

struct AttentionOutputs {
    std::optional<TensorView> residual;  // read
    TensorView out;
    std::optional<TensorView> lse;       // in the accumulation type, softmax only
    std::optional<TensorView> attn_out;  // the ungated output, in the accumulation type
};

struct AttentionGradients {
    TensorView grad_out;                 // read
    std::optional<TensorView> attn_out;  // the forward's, read; only a gate needs it
    std::optional<TensorView> grad_lse;  // in the accumulation type, read; None: zeros
    TensorView grad_q, grad_k;           // where v is k, grad_k is the sum of both gradients
    std::optional<TensorView> grad_v;
    std::optional<TensorView> grad_gate;  // of the output's rank; axes of size 1 are summed
    VariantGradients variant;
};

template <typename Reader>
void read(Reader& next, AttentionInputs& in) {
    in.layout = next.choice("layout", parse_query_layout);
    next.tensor("q", in.q);
    next.tensor("k", in.k);
    next.optional("v", in.v);
    next.optional("q_offsets", in.q_offsets);
    next.tensor("kv_offsets", in.kv_offsets);
    next.optional("gate", in.gate);
    in.gating.inside = next.choice("gate_form", parse_gate_form);
    in.gating.activation = next.choice("gate_activation", parse_gate_activation);
    read(next, in.variant, in.variant_tensors);
    in.skip_prefix = next.integer("skip_prefix");
    next.optional("cos", in.cos);
    next.optional("sin", in.sin);
    next.optional("positions_q", in.positions_q);
    next.optional("positions_k", in.positions_k);
    in.rope_interleaved = next.boolean("rope_interleaved");
}

template <typename Reader>
void read(Reader& next, AttentionOutputs& outputs) {
    next.optional("residual", outputs.residual);
    next.tensor("out", outputs.out);
    next.optional("lse", outputs.lse);
    next.optional("attn_out", outputs.attn_out);
}

template <typename Reader>
void read(Reader& next, AttentionGradients& grads) {
    next.tensor("grad_out", grads.grad_out);
    next.optional("attn_out", grads.attn_out);
    next.optional("grad_lse", grads.grad_lse);
    next.tensor("grad_q", grads.grad_q);
    next.tensor("grad_k", grads.grad_k);
    next.optional("grad_v", grads.grad_v);
    next.optional("grad_gate", grads.grad_gate);
    read(next, grads.variant);
}

void check_inputs(const Checks& check, const AttentionInputs& in);
// `x` must have the output's shape with `last` as its last axis, or without a last axis.
void check_like_output(const Checks& check, const AttentionInputs& in, const char* argument, const TensorView& x,
                       DType dtype, std::optional<Axis> last);
// The output's last axis.
Axis value_axis(const AttentionInputs& in);
// `given` must be present exactly where `expected` is true.
void check_pair(const Checks& check, const char* argument, bool expected, const std::optional<TensorView>& given);
void check_key_gradients(const Checks& check, const AttentionInputs& in, const AttentionGradients& grads);
void check_outputs(const Checks& check, const AttentionInputs& in, const AttentionOutputs& outputs);
// The gradient of the log-sum-exp, if it is given.
void check_lse_gradient(const Checks& check, const AttentionInputs& in, const AttentionGradients& grads);
void check_gradients(const Checks& check, const AttentionInputs& in, const AttentionGradients& grads);

}  // namespace interformer
