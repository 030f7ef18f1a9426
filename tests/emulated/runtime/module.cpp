// The CUDA part of interformer_kernels._C, emulated: the same functions, for tensors on the CPU.
#include <pybind11/pybind11.h>

#include <string>

#include "common/exchange.h"
#include "cuda/bindings.h"
#include "planted.h"
#include "scheduler.h"

namespace interformer {
namespace {

void exchange(const std::string& fault, py::handle x, py::handle out) {
    const Viewer view("exchange");
    const TensorView from = view("x", x);
    cuda::exchange(fault, from, view("out", out), cuda::Stream("exchange", from, nullptr));
}

}  // namespace

PYBIND11_MODULE(interformer_emulated, m) {
    translate_type_errors();
    cuda::bind(m);
    m.def(
        "configure",
        [](uint64_t seed, bool lazy_copies, unsigned last_blocks) {
            emulation::options = {seed, lazy_copies, last_blocks};
        },
        py::arg("seed"), py::arg("lazy_copies"), py::arg("last_blocks") = 0);
    m.def("exchange", &exchange);
}

}  // namespace interformer
