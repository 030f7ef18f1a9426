// Functions of the CUDA part for Python, and for the module of tests/emulated. Each takes tuples: the call, what is
// written, and the workspace where it needs one.
#pragma once

#include <pybind11/pybind11.h>

#include "common/entries.h"
#include "common/exchange.h"
#include "cuda/apply_rotary.h"
#include "cuda/attention.h"
#include "cuda/jagged_softmax.h"
#include "cuda/jagged_weighted_sum.h"
#include "cuda/personalized_ffn.h"

namespace interformer {
namespace cuda {

inline const TensorView& lead(const AttentionInputs& in) {
    return in.k;
}
inline const TensorView& lead(const FfnInputs& in) {
    return in.x;
}
inline const TensorView& lead(const RotaryInputs& in) {
    return in.x;
}
inline const TensorView& lead(const SoftmaxInputs& in) {
    return in.scores;
}
inline const TensorView& lead(const WeightedSumInputs& in) {
    return in.v;
}

// Calls `operation(in, to, stream)` with what the tuples hold, on the caller's stream.
template <typename Inputs, typename Outputs, typename Operation>
void run(const Viewer& view, py::handle call, const char* written, py::handle outputs, Operation&& operation) {
    py::handle tensor;
    const auto in = from_tuple<Inputs>(view, "call", call);
    const auto to = from_tuple<Outputs>(view, written, outputs, &tensor);
    const Stream stream(view.function(), lead(in), view.current_stream(tensor, lead(in)));
    const py::gil_scoped_release released;
    operation(in, to, stream);
}

inline void bind_attention_forward(py::handle call, py::handle outputs, py::handle workspace, bool tf32) {
    const Viewer view("attention_forward");
    const auto memory = from_tuple<ForwardWorkspace>(view, "workspace", workspace);
    run<AttentionInputs, AttentionOutputs>(
        view, call, "outputs", outputs,
        [&](const auto& in, const auto& to, const Stream& stream) { attention_forward(in, to, memory, tf32, stream); });
}

inline void bind_attention_backward(py::handle call, py::handle gradients, py::handle workspace, bool tf32) {
    const Viewer view("attention_backward");
    const auto memory = from_tuple<BackwardWorkspace>(view, "workspace", workspace);
    run<AttentionInputs, AttentionGradients>(view, call, "gradients", gradients,
                                             [&](const auto& in, const auto& grads, const Stream& stream) {
                                                 attention_backward(in, grads, memory, tf32, stream);
                                             });
}

// The Python function of an operation without further arguments.
template <typename Inputs, typename Outputs>
auto bound(const char* name, const char* written, void (*operation)(const Inputs&, const Outputs&, const Stream&)) {
    return [=](py::handle call, py::handle outputs) {
        run<Inputs, Outputs>(Viewer(name), call, written, outputs, operation);
    };
}

inline void bind_personalized_ffn_forward(py::handle call, py::handle outputs, bool tf32) {
    run<FfnInputs, FfnOutputs>(
        Viewer("personalized_ffn_forward"), call, "outputs", outputs,
        [&](const auto& in, const auto& to, const Stream& stream) { personalized_ffn_forward(in, to, tf32, stream); });
}

inline void bind_personalized_ffn_backward(py::handle call, py::handle gradients, py::handle workspace, bool tf32) {
    const Viewer view("personalized_ffn_backward");
    const auto memory = from_tuple<FfnWorkspace>(view, "workspace", workspace);
    run<FfnInputs, FfnGradients>(view, call, "gradients", gradients,
                                 [&](const auto& in, const auto& grads, const Stream& stream) {
                                     personalized_ffn_backward(in, grads, memory, tf32, stream);
                                 });
}

inline void bind(py::module_& m) {
    m.attr("cuda_scheduler_size") = kSchedulerSize;
    m.attr("cuda_widest_rope") = kWidestRope;
    m.def("cuda_attention_forward", &bind_attention_forward);
    m.def("cuda_attention_backward", &bind_attention_backward);
    m.def("cuda_apply_rotary", bound("apply_rotary", "outputs", &apply_rotary));
    m.def("cuda_jagged_softmax_forward", bound("jagged_softmax_forward", "outputs", &jagged_softmax_forward));
    m.def("cuda_jagged_softmax_backward", bound("jagged_softmax_backward", "gradients", &jagged_softmax_backward));
    m.def("cuda_jagged_weighted_sum_forward",
          bound("jagged_weighted_sum_forward", "outputs", &jagged_weighted_sum_forward));
    m.def("cuda_jagged_weighted_sum_backward",
          bound("jagged_weighted_sum_backward", "gradients", &jagged_weighted_sum_backward));
    m.def("cuda_personalized_ffn_forward", &bind_personalized_ffn_forward);
    m.def("cuda_personalized_ffn_backward", &bind_personalized_ffn_backward);
}

}  // namespace cuda
}  // namespace interformer
