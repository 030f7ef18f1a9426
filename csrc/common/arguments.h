// The calls of the ops, read from their Python arguments. Only the bindings include this file.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "common/attention_call.h"
#include "common/entries.h"
#include "common/exchange.h"
#include "common/ffn_call.h"
#include "common/rotary_call.h"

namespace interformer {

// Reads the arguments of attention that the forward and the backward share. `next` is `Entries`, which takes them from
// the call's tuple, or `EntryNames`, which records their names.
template <typename Reader>
AttentionInputs read_attention_inputs(Reader& next) {
    AttentionInputs in;
    in.layout = next.choice("layout", parse_query_layout);
    next.tensor("q", in.q);
    next.tensor("k", in.k);
    next.optional("v", in.v);
    next.optional("q_offsets", in.q_offsets);
    next.tensor("kv_offsets", in.kv_offsets);
    next.optional("gate", in.gate);
    in.gating.inside = next.choice("gate_form", parse_gate_form);
    in.gating.activation = next.choice("gate_activation", parse_gate_activation);
    in.variant = read_variant(next);
    in.skip_prefix = next.integer("skip_prefix");
    next.optional("cos", in.cos);
    next.optional("sin", in.sin);
    next.optional("positions_q", in.positions_q);
    next.optional("positions_k", in.positions_k);
    in.rope_interleaved = next.boolean("rope_interleaved");
    next.end();
    return in;
}

// From the tuple that Python's `AttentionCall` is.
inline AttentionInputs attention_inputs(const Viewer& view, py::handle call) {
    Entries entries(view, "call", call);
    return read_attention_inputs(entries);
}

// The names of the tuple's entries, in order.
inline std::vector<std::string> attention_fields() {
    EntryNames names;
    read_attention_inputs(names);
    return names.names();
}

inline AttentionOutputs attention_outputs(const Viewer& view, py::handle residual, py::handle out, py::handle lse,
                                          py::handle attn_out) {
    return {view.optional("residual", residual), view("out", out), view.optional("lse", lse),
            view.optional("attn_out", attn_out)};
}

inline AttentionGradients attention_gradients(const Viewer& view, py::handle grad_out, py::handle attn_out,
                                              py::handle grad_q, py::handle grad_k, py::handle grad_v,
                                              py::handle grad_gate) {
    return {view("grad_out", grad_out), view.optional("attn_out", attn_out), view("grad_q", grad_q),
            view("grad_k", grad_k),     view.optional("grad_v", grad_v),     view.optional("grad_gate", grad_gate)};
}

inline FfnInputs ffn_inputs(const Viewer& view, py::handle x, py::handle weight, py::handle offsets, py::handle bias,
                            const std::string& activation) {
    return {view("x", x), view("weight", weight), view("offsets", offsets), view.optional("bias", bias),
            parse_activation(activation)};
}

inline FfnOutputs ffn_outputs(const Viewer& view, py::handle residual, py::handle out) {
    return {view.optional("residual", residual), view("out", out)};
}

inline FfnGradients ffn_gradients(const Viewer& view, py::handle grad_out, py::handle grad_x, py::handle grad_weight,
                                  py::handle grad_bias) {
    return {view("grad_out", grad_out), view("grad_x", grad_x), view("grad_weight", grad_weight),
            view.optional("grad_bias", grad_bias)};
}

inline RotaryCall rotary_call(const Viewer& view, py::handle x, py::handle offsets, py::handle cos, py::handle sin,
                              py::handle positions, bool interleaved, bool backwards, py::handle out) {
    return {view("x", x),
            view("offsets", offsets),
            view("cos", cos),
            view("sin", sin),
            view.optional("positions", positions),
            interleaved,
            backwards,
            view("out", out)};
}

}  // namespace interformer
