// Functions of the CUDA part for Python, and for the module of tests/emulated.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>

#include "common/arguments.h"
#include "common/exchange.h"
#include "cuda/apply_rotary.h"
#include "cuda/attention.h"
#include "cuda/personalized_ffn.h"

namespace interformer {
namespace cuda {

inline void bind_apply_rotary(py::handle x, py::handle offsets, py::handle cos, py::handle sin, py::handle positions,
                              bool interleaved, bool backwards, py::handle out) {
    const Viewer view("apply_rotary");
    const RotaryCall call = rotary_call(view, x, offsets, cos, sin, positions, interleaved, backwards, out);
    const Stream stream("apply_rotary", call.x, view.current_stream(x, call.x));
    const py::gil_scoped_release released;
    apply_rotary(call, stream);
}

inline void bind_attention_forward(py::handle call, py::handle residual, py::handle out, py::handle lse,
                                   py::handle attn_out, int64_t split, py::handle pieces, py::handle weights,
                                   py::handle queue, bool tf32) {
    const Viewer view("attention_forward");
    const AttentionInputs in = attention_inputs(view, call);
    const AttentionOutputs to = attention_outputs(view, residual, out, lse, attn_out);
    const AttentionPieces chunks{split, view.optional("pieces", pieces), view.optional("weights", weights)};
    const TensorView counter = view("queue", queue);
    const Stream stream("attention_forward", in.k, view.current_stream(out, in.k));
    const py::gil_scoped_release released;
    attention_forward(in, to, chunks, counter, tf32, stream);
}

inline void bind_attention_backward(py::handle call, py::handle grad_out, py::handle attn_out, py::handle lse,
                                    py::handle delta, py::handle share, py::handle grad_attn_out, py::handle grad_q,
                                    py::handle grad_k, py::handle grad_v, py::handle grad_gate, int64_t gate_block,
                                    int64_t split, py::handle pieces, py::handle weights, int64_t parts,
                                    py::handle queue, bool tf32) {
    const Viewer view("attention_backward");
    const AttentionInputs in = attention_inputs(view, call);
    const AttentionGradients grads = attention_gradients(view, grad_out, attn_out, grad_q, grad_k, grad_v, grad_gate);
    const AttentionSides sides{view.optional("lse", lse), view.optional("delta", delta), view.optional("share", share),
                               view.optional("grad_attn_out", grad_attn_out)};
    const AttentionPieces chunks{split, view.optional("pieces", pieces), view.optional("weights", weights)};
    const TensorView counter = view("queue", queue);
    const Stream stream("attention_backward", in.k, view.current_stream(grad_out, in.k));
    const py::gil_scoped_release released;
    attention_backward(in, grads, sides, gate_block, chunks, parts, counter, tf32, stream);
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
                                           const std::string& activation, py::handle grad_out, py::handle before,
                                           py::handle grad_x, py::handle grad_weight, py::handle grad_bias,
                                           int64_t split, py::handle pieces, bool tf32) {
    const Viewer view("personalized_ffn_backward");
    const FfnInputs in = ffn_inputs(view, x, weight, offsets, bias, activation);
    const FfnGradients grads = ffn_gradients(view, grad_out, grad_x, grad_weight, grad_bias);
    const std::optional<TensorView> workspace = view.optional("before", before);
    const FfnChunks chunks{split, view.optional("pieces", pieces)};
    const Stream stream("personalized_ffn_backward", in.x, view.current_stream(x, in.x));
    const py::gil_scoped_release released;
    personalized_ffn_backward(in, grads, workspace, chunks, tf32, stream);
}

inline void bind(py::module_& m) {
    m.def("cuda_attention_forward", &bind_attention_forward);
    m.def("cuda_attention_backward", &bind_attention_backward);
    m.def("cuda_apply_rotary", &bind_apply_rotary);
    m.def("cuda_personalized_ffn_forward", &bind_personalized_ffn_forward);
    m.def("cuda_personalized_ffn_backward", &bind_personalized_ffn_backward);
}

}  // namespace cuda
}  // namespace interformer
