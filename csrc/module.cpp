// The Python module interformer_kernels._C: makes views of tensors, releases the GIL and calls kernels, which check
// their arguments. Only this file and the bindings that it includes know pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "common/checks.h"
#include "common/entries.h"
#include "common/exchange.h"
#include "cpu/apply_rotary.h"
#include "cpu/attention.h"
#include "cpu/eager_attention.h"
#include "cpu/features.h"
#include "cpu/folded_pooling.h"
#include "cpu/freed_memory.h"
#include "cpu/isa.h"
#include "cpu/jagged_softmax.h"
#include "cpu/jagged_weighted_sum.h"
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

// The Python function of an operation: two tuples, of what it reads and of what it writes, and a number of threads.
template <typename Inputs, typename Outputs>
auto bound(const char* name, const char* written, void (*operation)(const Inputs&, const Outputs&, int64_t)) {
    return [=](py::handle call, py::handle outputs, int64_t threads) {
        const Viewer view(name);
        const auto in = from_tuple<Inputs>(view, "call", call);
        const auto to = from_tuple<Outputs>(view, written, outputs);
        const py::gil_scoped_release released;
        operation(in, to, threads);
    };
}

// `run` of an eager call, or None where the call is declined.
template <typename Run>
py::object eager(const char* name, py::handle call, Run&& run) {
    try {
        return run(EagerAttention(name, call));
    } catch (const std::exception&) {  // the long way finds it again, and has the words
        return py::none();
    }
}

py::object eager_attention_forward(py::handle call, py::handle residual, bool keep_lse, bool keep_attn_out,
                                   bool validate, int64_t threads) {
    return eager("eager_attention_forward", call, [&](const EagerAttention& attention) {
        return attention.forward(residual, keep_lse, keep_attn_out, validate, threads);
    });
}

py::object eager_attention_backward(py::handle call, py::handle grad_out, py::handle attn_out, py::handle grad_lse,
                                    int64_t threads) {
    return eager("eager_attention_backward", call, [&](const EagerAttention& attention) {
        return attention.backward(grad_out, attn_out, grad_lse, threads);
    });
}

// The names of the entries that are read from each tuple, by the names that interformer_kernels/_calls.py has for them.
std::map<std::string, std::vector<std::string>> fields() {
    return {{"AttentionCall", field_names<AttentionInputs>()},
            {"AttentionOutputs", field_names<AttentionOutputs>()},
            {"AttentionGradients", field_names<AttentionGradients>()},
            {"FoldedCall", field_names<FoldedInputs>()},
            {"FoldedOutputs", field_names<FoldedOutputs>()},
            {"FfnCall", field_names<FfnInputs>()},
            {"FfnOutputs", field_names<FfnOutputs>()},
            {"FfnGradients", field_names<FfnGradients>()},
            {"RotaryCall", field_names<RotaryInputs>()},
            {"RotaryOutputs", field_names<RotaryOutputs>()},
            {"SoftmaxCall", field_names<SoftmaxInputs>()},
            {"SoftmaxOutputs", field_names<SoftmaxOutputs>()},
            {"SoftmaxGradients", field_names<SoftmaxGradients>()},
            {"WeightedSumCall", field_names<WeightedSumInputs>()},
            {"WeightedSumOutputs", field_names<WeightedSumOutputs>()},
            {"WeightedSumGradients", field_names<WeightedSumGradients>()}};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native kernels of interformer_kernels. Tensors cross as DLPack views; `_C.pyi` has the signatures.";
    translate_type_errors();

    m.def("build_info", &build_info);
    m.def("cpu_features", &cpu_features);
    m.def("cuda_device_count", &cuda_device_count);
    m.def("keep_freed_memory", &keep_freed_memory);
    m.def("first_bad_offset", &bind_first_bad_offset, py::arg("offsets"), py::arg("total"));

    m.def("fields", &fields);
    m.def("attention_forward", bound("attention_forward", "outputs", &attention_forward));
    m.def("eager_attention_forward", &eager_attention_forward);
    m.def("eager_attention_backward", &eager_attention_backward);
    m.def("attention_backward", bound("attention_backward", "gradients", &attention_backward));
    m.def("folded_pooling_forward", bound("folded_pooling_forward", "outputs", &folded_pooling_forward));
    m.def("personalized_ffn_forward", bound("personalized_ffn_forward", "outputs", &personalized_ffn_forward));
    m.def("personalized_ffn_backward", bound("personalized_ffn_backward", "gradients", &personalized_ffn_backward));
    m.def("apply_rotary", bound("apply_rotary", "outputs", &apply_rotary));
    m.def("jagged_softmax_forward", bound("jagged_softmax_forward", "outputs", &jagged_softmax_forward));
    m.def("jagged_softmax_backward", bound("jagged_softmax_backward", "gradients", &jagged_softmax_backward));
    m.def("jagged_weighted_sum_forward", bound("jagged_weighted_sum_forward", "outputs", &jagged_weighted_sum_forward));
    m.def("jagged_weighted_sum_backward",
          bound("jagged_weighted_sum_backward", "gradients", &jagged_weighted_sum_backward));

#ifdef INTERFORMER_HAS_CUDA
    cuda::bind(m);
#endif
}

}  // namespace interformer
