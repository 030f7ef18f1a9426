// The Python module interformer_kernels._C: makes views of tensors, releases the GIL and calls kernels, which check
// their arguments. Only this file and the bindings that it includes know pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "common/arguments.h"
#include "common/checks.h"
#include "common/exchange.h"
#include "cpu/apply_rotary.h"
#include "cpu/attention.h"
#include "cpu/features.h"
#include "cpu/isa.h"
#include "cpu/personalized_ffn.h"
#include "cpu/rows.h"
#ifdef INTERFORMER_HAS_CUDA
#include "cuda/bindings.h"
#include "cuda/device.h"
#endif

namespace interformer {

namespace {

// ---------------------------------------------------------------- build information

py::dict build_info() {
    py::dict info;
    info["compiler"] = INTERFORMER_COMPILER;
    info["openmp"] = _OPENMP;  // the date of the standard, as the compiler gives it
    info["cpu_levels"] = usable_isas();
    info["cpu_level"] = chosen_isa();
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

void bind_attention_forward(py::handle call, py::handle residual, py::handle out, py::handle lse, py::handle attn_out,
                            int64_t threads) {
    const Viewer view("attention_forward");
    const AttentionInputs in = attention_inputs(view, call);
    const AttentionOutputs outputs = attention_outputs(view, residual, out, lse, attn_out);
    const py::gil_scoped_release released;
    attention_forward(in, outputs, threads);
}

void bind_attention_backward(py::handle call, py::handle grad_out, py::handle attn_out, py::handle grad_q,
                             py::handle grad_k, py::handle grad_v, py::handle grad_gate, int64_t threads) {
    const Viewer view("attention_backward");
    const AttentionInputs in = attention_inputs(view, call);
    const AttentionGradients grads = attention_gradients(view, grad_out, attn_out, grad_q, grad_k, grad_v, grad_gate);
    const py::gil_scoped_release released;
    attention_backward(in, grads, threads);
}

void bind_personalized_ffn_forward(py::handle x, py::handle weight, py::handle offsets, py::handle bias,
                                   const std::string& activation, py::handle residual, py::handle out,
                                   int64_t threads) {
    const Viewer view("personalized_ffn_forward");
    const FfnInputs in = ffn_inputs(view, x, weight, offsets, bias, activation);
    const FfnOutputs outputs = ffn_outputs(view, residual, out);
    const py::gil_scoped_release released;
    personalized_ffn_forward(in, outputs, threads);
}

void bind_personalized_ffn_backward(py::handle x, py::handle weight, py::handle offsets, py::handle bias,
                                    const std::string& activation, py::handle grad_out, py::handle grad_x,
                                    py::handle grad_weight, py::handle grad_bias, int64_t threads) {
    const Viewer view("personalized_ffn_backward");
    const FfnInputs in = ffn_inputs(view, x, weight, offsets, bias, activation);
    const FfnGradients grads = ffn_gradients(view, grad_out, grad_x, grad_weight, grad_bias);
    const py::gil_scoped_release released;
    personalized_ffn_backward(in, grads, threads);
}

void bind_apply_rotary(py::handle x, py::handle offsets, py::handle cos, py::handle sin, py::handle positions,
                       bool interleaved, bool backwards, py::handle out, int64_t threads) {
    const Viewer view("apply_rotary");
    const RotaryCall call = rotary_call(view, x, offsets, cos, sin, positions, interleaved, backwards, out);
    const py::gil_scoped_release released;
    apply_rotary(call, threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native kernels of interformer_kernels. Tensors cross as DLPack views; `_C.pyi` has the signatures.";
    translate_type_errors();

    m.def("build_info", &build_info);
    m.def("cpu_features", &cpu_features);
    m.def("cuda_device_count", &cuda_device_count);
    m.def("first_bad_offset", &bind_first_bad_offset, py::arg("offsets"), py::arg("total"));

    m.def("attention_fields", &attention_fields);
    m.def("attention_forward", &bind_attention_forward);
    m.def("attention_backward", &bind_attention_backward);
    m.def("personalized_ffn_forward", &bind_personalized_ffn_forward);
    m.def("personalized_ffn_backward", &bind_personalized_ffn_backward);
    m.def("apply_rotary", &bind_apply_rotary);

#ifdef INTERFORMER_HAS_CUDA
    cuda::bind(m);
#endif
}

}  // namespace interformer
