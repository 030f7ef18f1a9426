// The CUDA part of interformer_kernels._C, emulated: the same functions, for tensors on the CPU.
#include <pybind11/pybind11.h>

#include <string>

#include "common/entries.h"
#include "common/exchange.h"
#include "cuda/bindings.h"
#include "launches.h"
#include "memory.h"
#include "planted.h"
#include "scheduler.h"

namespace interformer {
namespace {

void exchange(const std::string& fault, py::handle x, py::handle out) {
    const Viewer view("exchange");
    const TensorView from = view("x", x);
    cuda::exchange(fault, from, view("out", out), cuda::Stream("exchange", from, nullptr));
}

void reverse_rows(const std::string& fault, py::handle x, py::handle claimed, py::handle out) {
    const Viewer view("reverse_rows");
    const TensorView from = view("x", x);
    cuda::reverse_rows(fault, from, view("claimed", claimed), view("out", out),
                       cuda::Stream("reverse_rows", from, nullptr));
}

void transpose(const std::string& fault, py::handle x, py::handle out) {
    const Viewer view("transpose");
    const TensorView from = view("x", x);
    cuda::transpose(fault, from, view("out", out), cuda::Stream("transpose", from, nullptr));
}

// Attention whose pointwise score is the sigmoid, whatever the call names. No public score has act(0) != 0, so without
// it no test could tell whether kernels mask a score before or after they map it.
AttentionInputs with_sigmoid(AttentionInputs in) {
    in.variant.score = {false, Activation::sigmoid};
    return in;
}

void sigmoid_attention_forward(py::handle call, py::handle outputs, py::handle workspace, bool tf32) {
    const Viewer view("attention_forward");
    const auto memory = from_tuple<cuda::ForwardWorkspace>(view, "workspace", workspace);
    cuda::run<AttentionInputs, AttentionOutputs>(
        view, call, "outputs", outputs, [&](const auto& in, const auto& to, const cuda::Stream& stream) {
            cuda::attention_forward(with_sigmoid(in), to, memory, tf32, stream);
        });
}

void sigmoid_attention_backward(py::handle call, py::handle gradients, py::handle workspace, bool tf32) {
    const Viewer view("attention_backward");
    const auto memory = from_tuple<cuda::BackwardWorkspace>(view, "workspace", workspace);
    cuda::run<AttentionInputs, AttentionGradients>(
        view, call, "gradients", gradients, [&](const auto& in, const auto& grads, const cuda::Stream& stream) {
            cuda::attention_backward(with_sigmoid(in), grads, memory, tf32, stream);
        });
}

// (offset of the kernel, access, offset of the place in its code, requests, units, fewest units, bytes) of all places.
py::list memory_traffic() {
    py::list lines;
    for (const auto& [place, sum] : emulation::memory_traffic())
        lines.append(py::make_tuple(
            emulation::module_offset(place.kernel), emulation::kAccessNames[static_cast<int>(place.access)],
            emulation::module_offset(place.code), sum.requests, sum.units, sum.fewest, sum.bytes));
    return lines;
}

// (offset of the kernel, blocks, threads, bytes of shared memory, arguments) of the listed launches.
py::list launches() {
    py::list lines;
    for (const emulation::Launched& launch : emulation::launches())
        lines.append(py::make_tuple(emulation::module_offset(launch.grid.kernel), launch.grid.blocks,
                                    launch.grid.threads, launch.grid.shared, py::bytes(launch.arguments)));
    return lines;
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
    m.def("count_memory", &emulation::count_memory, py::arg("on"));
    m.def("memory_traffic", &memory_traffic);
    m.def("list_launches", &emulation::list_launches, py::arg("on"));
    m.def("launches", &launches);
    m.def("exchange", &exchange);
    m.def("reverse_rows", &reverse_rows);
    m.def("transpose", &transpose);
    m.def("sigmoid_attention_forward", &sigmoid_attention_forward);
    m.def("sigmoid_attention_backward", &sigmoid_attention_backward);
}

}  // namespace interformer
