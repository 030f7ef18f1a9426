// The Python module interformer_kernels._C: the one file that knows pybind11. It makes views of tensors, gives the GIL
// back and calls kernels; what a kernel wants of its arguments, it checks itself.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "common/checks.h"
#include "common/exchange.h"
#include "cpu/features.h"
#include "cpu/pma_pooling.h"
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
    info["cpu_levels"] = std::vector<std::string>{"generic"};
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

PmaPoolingInputs pma_pooling_inputs(const Viewer& view, py::handle seeds, py::handle k, py::handle v,
                                    py::handle offsets, py::handle gate, double scale, int64_t skip_prefix,
                                    const std::string& score, double post_scale, const std::string& gate_form,
                                    const std::string& gate_activation) {
    return {view("seeds", seeds),
            view("k", k),
            view.optional("v", v),
            view("offsets", offsets),
            view.optional("gate", gate),
            scale,
            skip_prefix,
            parse_score(score),
            post_scale,
            parse_gate(gate_form, gate_activation)};
}

void bind_pma_pooling_forward(py::handle seeds, py::handle k, py::handle v, py::handle offsets, py::handle gate,
                              py::handle residual, double scale, int64_t skip_prefix, const std::string& score,
                              double post_scale, const std::string& gate_form, const std::string& gate_activation,
                              py::handle out, py::handle lse, py::handle attended, int64_t threads) {
    const Viewer view("pma_pooling_forward");
    const PmaPoolingInputs in = pma_pooling_inputs(view, seeds, k, v, offsets, gate, scale, skip_prefix, score,
                                                   post_scale, gate_form, gate_activation);
    const PmaPoolingOutputs to{view.optional("residual", residual), view("out", out), view.optional("lse", lse),
                               view.optional("attended", attended)};
    const py::gil_scoped_release released;
    pma_pooling_forward(in, to, threads);
}

void bind_pma_pooling_backward(py::handle grad_out, py::handle attended, py::handle seeds, py::handle k, py::handle v,
                               py::handle offsets, py::handle gate, double scale, int64_t skip_prefix,
                               const std::string& score, double post_scale, const std::string& gate_form,
                               const std::string& gate_activation, py::handle grad_seeds, py::handle grad_k,
                               py::handle grad_v, py::handle grad_gate, int64_t threads) {
    const Viewer view("pma_pooling_backward");
    const PmaPoolingInputs in = pma_pooling_inputs(view, seeds, k, v, offsets, gate, scale, skip_prefix, score,
                                                   post_scale, gate_form, gate_activation);
    const PmaPoolingGradients grads{view("grad_out", grad_out),      view.optional("attended", attended),
                                    view("grad_seeds", grad_seeds),  view("grad_k", grad_k),
                                    view.optional("grad_v", grad_v), view.optional("grad_gate", grad_gate)};
    const py::gil_scoped_release released;
    pma_pooling_backward(in, grads, threads);
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

    m.def("pma_pooling_forward", &bind_pma_pooling_forward, py::arg("seeds"), py::arg("k"), py::arg("v"),
          py::arg("offsets"), py::arg("gate"), py::arg("residual"), py::arg("scale"), py::arg("skip_prefix"),
          py::arg("score"), py::arg("post_scale"), py::arg("gate_form"), py::arg("gate_activation"), py::arg("out"),
          py::arg("lse"), py::arg("attended"), py::arg("threads"));
    m.def("pma_pooling_backward", &bind_pma_pooling_backward, py::arg("grad_out"), py::arg("attended"),
          py::arg("seeds"), py::arg("k"), py::arg("v"), py::arg("offsets"), py::arg("gate"), py::arg("scale"),
          py::arg("skip_prefix"), py::arg("score"), py::arg("post_scale"), py::arg("gate_form"),
          py::arg("gate_activation"), py::arg("grad_seeds"), py::arg("grad_k"), py::arg("grad_v"), py::arg("grad_gate"),
          py::arg("threads"));
}

}  // namespace interformer
