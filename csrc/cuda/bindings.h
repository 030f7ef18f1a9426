// Functions of the CUDA part for Python, and for the module of tests/emulated.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>

#include "common/arguments.h"
#include "common/entries.h"
#include "common/exchange.h"
#include "cuda/apply_rotary.h"
#include "cuda/attention.h"
#include "cuda/personalized_ffn.h"

namespace interformer {
namespace cuda {

// ---------------------------------------------------------------- tuples of arguments, as _C.pyi names their entries

inline AttentionOutputs read_outputs(const Viewer& view, py::handle outputs) {
    Entries next(view, "outputs", outputs);
    AttentionOutputs to;
    next.optional("residual", to.residual);
    next.tensor("out", to.out);
    next.optional("lse", to.lse);
    next.optional("attn_out", to.attn_out);
    next.end();
    return to;
}

inline AttentionGradients read_gradients(const Viewer& view, py::handle gradients) {
    Entries next(view, "gradients", gradients);
    AttentionGradients grads;
    next.tensor("grad_out", grads.grad_out);
    next.optional("attn_out", grads.attn_out);
    next.tensor("grad_q", grads.grad_q);
    next.tensor("grad_k", grads.grad_k);
    next.optional("grad_v", grads.grad_v);
    next.optional("grad_gate", grads.grad_gate);
    next.end();
    return grads;
}

inline SplitKv read_splits(Entries& next) {
    SplitKv splits;
    splits.split_kv = next.integer("split_kv");
    next.optional("partials", splits.partials);
    next.optional("partial_stats", splits.partial_stats);
    return splits;
}

inline ForwardWorkspace read_forward_workspace(const Viewer& view, py::handle workspace) {
    Entries next(view, "workspace", workspace);
    ForwardWorkspace memory;
    memory.splits = read_splits(next);
    next.tensor("scheduler", memory.scheduler);
    next.end();
    return memory;
}

inline BackwardWorkspace read_backward_workspace(const Viewer& view, py::handle workspace) {
    Entries next(view, "workspace", workspace);
    BackwardWorkspace memory;
    next.optional("lse", memory.lse);
    next.optional("delta", memory.delta);
    next.optional("inv_row_sum", memory.inv_row_sum);
    next.optional("grad_attn_out", memory.grad_attn_out);
    memory.gate_block = next.integer("gate_block");
    memory.key_shards = next.integer("key_shards");
    memory.splits = read_splits(next);
    next.tensor("scheduler", memory.scheduler);
    next.end();
    return memory;
}

// ---------------------------------------------------------------- calls

inline void run_attention_forward(const Viewer& view, const AttentionInputs& in, py::handle outputs,
                                  py::handle workspace, bool tf32) {
    const AttentionOutputs to = read_outputs(view, outputs);
    const ForwardWorkspace memory = read_forward_workspace(view, workspace);
    const Stream stream("attention_forward", in.k, view.current_stream(PyTuple_GET_ITEM(outputs.ptr(), 1), in.k));
    const py::gil_scoped_release released;
    attention_forward(in, to, memory, tf32, stream);
}

inline void run_attention_backward(const Viewer& view, const AttentionInputs& in, py::handle gradients,
                                   py::handle workspace, bool tf32) {
    const AttentionGradients grads = read_gradients(view, gradients);
    const BackwardWorkspace memory = read_backward_workspace(view, workspace);
    const Stream stream("attention_backward", in.k, view.current_stream(PyTuple_GET_ITEM(gradients.ptr(), 0), in.k));
    const py::gil_scoped_release released;
    attention_backward(in, grads, memory, tf32, stream);
}

inline void bind_attention_forward(py::handle call, py::handle outputs, py::handle workspace, bool tf32) {
    const Viewer view("attention_forward");
    run_attention_forward(view, attention_inputs(view, call), outputs, workspace, tf32);
}

inline void bind_attention_backward(py::handle call, py::handle gradients, py::handle workspace, bool tf32) {
    const Viewer view("attention_backward");
    run_attention_backward(view, attention_inputs(view, call), gradients, workspace, tf32);
}

inline void bind_apply_rotary(py::handle x, py::handle offsets, py::handle cos, py::handle sin, py::handle positions,
                              bool interleaved, bool backwards, py::handle out) {
    const Viewer view("apply_rotary");
    const RotaryCall call = rotary_call(view, x, offsets, cos, sin, positions, interleaved, backwards, out);
    const Stream stream("apply_rotary", call.x, view.current_stream(x, call.x));
    const py::gil_scoped_release released;
    apply_rotary(call, stream);
}

inline void bind_personalized_ffn_forward(py::handle x, py::handle weight, py::handle offsets, py::handle bias,
                                          const std::string& activation, py::handle residual, py::handle out,
                                          bool tf32) {
    const Viewer view("personalized_ffn_forward");
    const FfnInputs in = ffn_inputs(view, x, weight, offsets, bias, activation);
    const FfnOutputs to = ffn_outputs(view, residual, out);
    const Stream stream("personalized_ffn_forward", in.x, view.current_stream(x, in.x));
    const py::gil_scoped_release released;
    personalized_ffn_forward(in, to, tf32, stream);
}

inline void bind_personalized_ffn_backward(py::handle x, py::handle weight, py::handle offsets, py::handle bias,
                                           const std::string& activation, py::handle grad_out, py::handle grad_x,
                                           py::handle grad_weight, py::handle grad_bias, py::handle workspace,
                                           bool tf32) {
    const Viewer view("personalized_ffn_backward");
    const FfnInputs in = ffn_inputs(view, x, weight, offsets, bias, activation);
    const FfnGradients grads = ffn_gradients(view, grad_out, grad_x, grad_weight, grad_bias);
    Entries next(view, "workspace", workspace);
    FfnWorkspace memory;
    next.optional("grad_pre_activation", memory.grad_pre_activation);
    memory.split_tokens = next.integer("split_tokens");
    next.optional("partials", memory.partials);
    next.end();
    const Stream stream("personalized_ffn_backward", in.x, view.current_stream(x, in.x));
    const py::gil_scoped_release released;
    personalized_ffn_backward(in, grads, memory, tf32, stream);
}

inline void bind(py::module_& m) {
    m.attr("cuda_scheduler_size") = kSchedulerSize;
    m.def("cuda_attention_forward", &bind_attention_forward);
    m.def("cuda_attention_backward", &bind_attention_backward);
    m.def("cuda_apply_rotary", &bind_apply_rotary);
    m.def("cuda_personalized_ffn_forward", &bind_personalized_ffn_forward);
    m.def("cuda_personalized_ffn_backward", &bind_personalized_ffn_backward);
}

}  // namespace cuda
}  // namespace interformer
