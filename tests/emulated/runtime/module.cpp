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

void turn_pieces(const std::string& fault, py::handle x, py::handle taken, py::handle out) {
    const Viewer view("turn_pieces");
    const TensorView from = view("x", x);
    cuda::turn_pieces(fault, from, view("taken", taken), view("out", out), cuda::Stream("turn_pieces", from, nullptr));
}

}  // namespace

PYBIND11_MODULE(interformer_emulated, m) {
    translate_type_errors();
    cuda::bind(m);
    m.def(
        "configure",
        [](uint64_t seed, bool lazy_copies, unsigned last_blocks, unsigned resident, bool noise) {
            emulation::options = {seed, lazy_copies, last_blocks, resident, noise};
        },
        py::arg("seed"), py::arg("lazy_copies"), py::arg("last_blocks") = 0, py::arg("resident") = 2,
        py::arg("noise") = false);
    m.def("exchange", &exchange);
    m.def("turn_pieces", &turn_pieces);
}

}  // namespace interformer
