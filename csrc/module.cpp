// The Python module interformer_kernels._C: the one file that knows pybind11. It makes views of tensors, gives the GIL
// back and calls kernels; what a kernel wants of its arguments, it checks itself.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "common/checks.h"
#include "common/entries.h"
#include "common/exchange.h"
#include "cpu/apply_rotary.h"
#include "cpu/attention.h"
#include "cpu/features.h"
#include "cpu/level.h"
#include "cpu/personalized_ffn.h"
#include "cpu/rows.h"
#ifdef INTERFORMER_HAS_CUDA
#include "cuda/device.h"
#endif

namespace interformer {

namespace {

// ---------------------------------------------------------------- what is built

py::dict build_info() {
    py::dict info;
    info["compiler"] = INTERFORMER_COMPILER;
    info["openmp"] = _OPENMP;  // the date of the standard, as the compiler gives it
    info["cpu_levels"] = usable_levels();
    info["cpu_level"] = chosen_level();
    info["cuda"] = INTERFORMER_CUDA_NOTE;
    info["cuda_architectures"] = py::str(INTERFORMER_CUDA_ARCHITECTURES).attr("split")();
#ifdef INTERFORMER_HAS_CUDA
    info["cuda_built"] = true;
    const CudaRuntime runtime = cuda_runtime();
    info["cuda_runtime"] = runtime.runtime_version;
    info["cuda_driver"] = runtime.driver_version;
#else
    info["cuda_built"] = false;
#endif
    return info;
}

int cuda_device_count() {
#ifdef INTERFORMER_HAS_CUDA
    return cuda_runtime().device_count;
#else
    return 0;
#endif
}

// ---------------------------------------------------------------- operations

int64_t bind_first_bad_offset(py::handle offsets, int64_t total) {
    const char* name = "first_bad_offset";
    const TensorView view = Viewer(name)("offsets", offsets);
    Checks(name).index("offsets", view);
    const py::gil_scoped_release released;
    return first_bad_offset(view, total);
}

// What both directions of the attention family read, from the tuple that `AttentionCall` names the entries of.
AttentionInputs attention_inputs(const Viewer& view, py::handle call) {
    Entries next(view, "call", call);
    AttentionInputs in;
    in.layout = parse_query_layout(next.text("layout"));
    next.tensor("q", in.q);
    next.tensor("k", in.k);
    next.optional("v", in.v);
    next.optional("q_offsets", in.q_offsets);
    next.tensor("kv_offsets", in.kv_offsets);
    next.optional("gate", in.gate);
    in.scale = next.number("scale");
    in.score = parse_score(next.text("score"));
    in.post_scale = next.number("post_scale");
    const std::string gate_form = next.text("gate_form");
    in.gating = parse_gate(gate_form, next.text("gate_activation"));
    in.skip_prefix = next.integer("skip_prefix");
    next.optional("cos", in.cos);
    next.optional("sin", in.sin);
    next.optional("positions_q", in.positions_q);
    next.optional("positions_k", in.positions_k);
    in.rope_interleaved = next.boolean("rope_interleaved");
    in.causal = next.boolean("causal");
    in.window_left = next.integer("window_left");
    in.window_right = next.integer("window_right");
    in.num_prefix = next.integer("num_prefix");
    next.end();
    return in;
}

void bind_attention_forward(py::handle call, py::handle residual, py::handle out, py::handle lse, py::handle attended,
                            int64_t threads) {
    const Viewer view("attention_forward");
    const AttentionInputs in = attention_inputs(view, call);
    const AttentionOutputs to{view.optional("residual", residual), view("out", out), view.optional("lse", lse),
                              view.optional("attended", attended)};
    const py::gil_scoped_release released;
    attention_forward(in, to, threads);
}

void bind_attention_backward(py::handle call, py::handle grad_out, py::handle attended, py::handle grad_q,
                             py::handle grad_k, py::handle grad_v, py::handle grad_gate, int64_t threads) {
    const Viewer view("attention_backward");
    const AttentionInputs in = attention_inputs(view, call);
    const AttentionGradients grads{view("grad_out", grad_out),      view.optional("attended", attended),
                                   view("grad_q", grad_q),          view("grad_k", grad_k),
                                   view.optional("grad_v", grad_v), view.optional("grad_gate", grad_gate)};
    const py::gil_scoped_release released;
    attention_backward(in, grads, threads);
}

FfnInputs ffn_inputs(const Viewer& view, py::handle x, py::handle weight, py::handle offsets, py::handle bias,
                     const std::string& activation) {
    return {view("x", x), view("weight", weight), view("offsets", offsets), view.optional("bias", bias),
            parse_activation(activation)};
}

void bind_personalized_ffn_forward(py::handle x, py::handle weight, py::handle offsets, py::handle bias,
                                   const std::string& activation, py::handle residual, py::handle out,
                                   int64_t threads) {
    const Viewer view("personalized_ffn_forward");
    const FfnInputs in = ffn_inputs(view, x, weight, offsets, bias, activation);
    const std::optional<TensorView> added = view.optional("residual", residual);
    const TensorView to = view("out", out);
    const py::gil_scoped_release released;
    personalized_ffn_forward(in, added, to, threads);
}

void bind_personalized_ffn_backward(py::handle x, py::handle weight, py::handle offsets, py::handle bias,
                                    const std::string& activation, py::handle grad_out, py::handle grad_x,
                                    py::handle grad_weight, py::handle grad_bias, int64_t threads) {
    const Viewer view("personalized_ffn_backward");
    const FfnInputs in = ffn_inputs(view, x, weight, offsets, bias, activation);
    const FfnGradients grads{view("grad_out", grad_out), view("grad_x", grad_x), view("grad_weight", grad_weight),
                             view.optional("grad_bias", grad_bias)};
    const py::gil_scoped_release released;
    personalized_ffn_backward(in, grads, threads);
}

void bind_apply_rotary(py::handle x, py::handle offsets, py::handle cos, py::handle sin, py::handle positions,
                       bool interleaved, bool backwards, py::handle out, int64_t threads) {
    const Viewer view("apply_rotary");
    const TensorView from = view("x", x), rows = view("offsets", offsets);
    const TensorView cosines = view("cos", cos), sines = view("sin", sin), to = view("out", out);
    const std::optional<TensorView> places = view.optional("positions", positions);
    const py::gil_scoped_release released;
    apply_rotary(from, rows, cosines, sines, places, interleaved, backwards, to, threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native kernels of interformer_kernels. Tensors cross as DLPack views; `_C.pyi` has the signatures.";
    py::register_exception_translator([](std::exception_ptr pending) {
        try {
            std::rethrow_exception(pending);
        } catch (const TypeError& error) {
            PyErr_SetString(PyExc_TypeError, error.what());
        }
    });

    m.def("build_info", &build_info);
    m.def("cpu_features", &cpu_features);
    m.def("cuda_device_count", &cuda_device_count);
    m.def("first_bad_offset", &bind_first_bad_offset, py::arg("offsets"), py::arg("total"));

    m.def("attention_forward", &bind_attention_forward);
    m.def("attention_backward", &bind_attention_backward);
    m.def("personalized_ffn_forward", &bind_personalized_ffn_forward);
    m.def("personalized_ffn_backward", &bind_personalized_ffn_backward);
    m.def("apply_rotary", &bind_apply_rotary);
}

}  // namespace interformer
