// A whole eager call of attention on the CPU, from Python's arguments to new tensors. Around a row of twenty tokens the
// questions of Python's checks, the dispatcher and the adapter would take four times as long as the kernel. Only the
// bindings include this file.
//
// A call is served where all tensors are plain, dense and on the CPU, every option has the kind that it is declared
// with, none is a tensor of the variant, and the contents of offsets are right where they are to be validated. Any
// other call is declined with None, before anything is computed: the long way serves it, or says what is wrong with it.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "common/attention_call.h"
#include "common/entries.h"
#include "cpu/attention.h"
#include "cpu/rows.h"

namespace interformer {

class EagerAttention {
  public:
    // `call` is an AttentionCall whose `scale` may be None, and whose `gate` need only broadcast to the output.
    explicit EagerAttention(const char* function, py::handle call)
        : view_(function, true), check_(function), in_(from_tuple<AttentionInputs>(view_, "call", call, &lead_)) {
        AttentionVariant& variant = in_.variant;
        const VariantTensors& tensors = in_.variant_tensors;
        if (tensors.num_targets || tensors.sinks || tensors.position_bias || tensors.time_bias || tensors.dropout_seed)
            check_.refuse("call", "without tensors of the variant", "one");
        // The gate is fitted to the output's shape, which is not known before the others are checked.
        std::optional<TensorView> gate;
        std::swap(gate, in_.gate);
        if (variant.default_scale && in_.k.axes == 3 && in_.k.shape[2] > 0) {
            variant.scale = std::pow(static_cast<double>(in_.k.shape[2]), -0.5);  // to the bit as in Python
            variant.default_scale = false;
        }
        check_inputs(check_, in_);
        if (gate) {
            gate_shape_ = shape_of(*gate);
            in_.gate = like_output("gate", *gate);
        }
    }

    // The output; the log-sum-exp and the ungated output, or None where they are not asked.
    py::object forward(py::handle residual, bool keep_lse, bool keep_attn_out, bool validate, int64_t threads) const {
        if (validate) check_contents();
        AttentionOutputs outputs{};
        if (const auto given = view_.optional("residual", residual)) outputs.residual = like_output("residual", *given);
        const Shape shape = out_shape();
        const py::object none = py::none(), out = empty(shape, outputs.out);
        const py::object lse = keep_lse ? empty({shape.begin(), shape.end() - 1}, outputs.lse.emplace(), true) : none;
        const py::object attn_out = keep_attn_out ? empty(shape, outputs.attn_out.emplace(), true) : none;
        {
            const py::gil_scoped_release released;
            attention_forward(in_, outputs, threads);
        }
        return py::make_tuple(out, lse, attn_out);
    }

    // The gradients of q, k, v and gate; None for one that was not given. Sums over rows, tokens or heads have the
    // accumulation type: those of shared queries, and of gates.
    py::object backward(py::handle grad_out, py::handle attn_out, py::handle grad_lse, int64_t threads) const {
        AttentionGradients grads{};
        view_.fill(grads.grad_out, "grad_out", grad_out);
        grads.grad_lse = view_.optional("grad_lse", grad_lse);
        if (in_.gate) grads.attn_out = view_.optional("attn_out", attn_out);
        const bool summed = in_.layout == QueryLayout::shared;
        const py::object none = py::none();
        py::object grad_q, grad_k, grad_v = none;
        if (side_by_side()) {
            TensorView whole;
            const int64_t* shape = in_.q.shape;
            const py::tuple slices = empty({shape[0], 3, shape[1], shape[2]}, whole).attr("unbind")(1);
            view_.fill(grads.grad_q, "grad_q", grad_q = slices[0]);
            view_.fill(grads.grad_k, "grad_k", grad_k = slices[1]);
            view_.fill(grads.grad_v.emplace(), "grad_v", grad_v = slices[2]);
        } else {
            grad_q = empty(shape_of(in_.q), grads.grad_q, summed);
            grad_k = empty(shape_of(in_.k), grads.grad_k);
            if (in_.v) grad_v = empty(shape_of(*in_.v), grads.grad_v.emplace());
        }
        py::object grad_gate = none;
        if (in_.gate) {
            grad_gate = empty(gate_shape_, grads.grad_gate.emplace(), true);
            grads.grad_gate = with_axes(*grads.grad_gate, in_.gate->axes);
        }
        {
            const py::gil_scoped_release released;
            attention_backward(in_, grads, threads);
        }
        return py::make_tuple(grad_q, grad_k, grad_v, grad_gate);
    }

  private:
    using Shape = std::vector<int64_t>;

    static Shape shape_of(const TensorView& x) { return {x.shape, x.shape + x.axes}; }

    Shape out_shape() const {
        Shape shape = shape_of(in_.q);
        shape.back() = value_axis(in_).size;
        if (in_.layout == QueryLayout::shared) shape.insert(shape.begin(), in_.kv_offsets.shape[0] - 1);
        return shape;
    }

    // Whether q, k and v are the three slices of one tensor [T, 3, H, D]: so are their gradients then, and whoever
    // split it need not copy them to put them together (ops/slices.py).
    bool side_by_side() const {
        const TensorView &q = in_.q, &k = in_.k;
        if (in_.layout != QueryLayout::packed || !in_.v || q.axes != 3) return false;
        const int64_t slice = q.shape[1] * q.shape[2], bytes = slice * q.raw_type.bits / 8;
        const auto is_slice = [&](const TensorView& x, int64_t number) {
            return std::equal(x.shape, x.shape + 3, q.shape) && x.strides[0] == 3 * slice &&
                   x.strides[1] == q.shape[2] && x.strides[2] == 1 &&
                   static_cast<char*>(x.data) == static_cast<char*>(q.data) + number * bytes;
        };
        return slice > 0 && is_slice(q, 0) && is_slice(k, 1) && is_slice(*in_.v, 2);
    }

    // `x` with leading axes of size 1.
    static TensorView with_axes(const TensorView& x, int axes) {
        TensorView wide = x;
        const int more = axes - x.axes;
        std::fill_n(wide.shape, more, 1);
        std::fill_n(wide.strides, more, 0);
        std::copy_n(x.shape, x.axes, wide.shape + more);
        std::copy_n(x.strides, x.axes, wide.strides + more);
        wide.axes = axes;
        return wide;
    }

    // `x` broadcast to the output's shape.
    TensorView like_output(const char* argument, const TensorView& x) const {
        const Shape shape = out_shape();
        const int axes = static_cast<int>(shape.size());
        if (x.axes > axes) check_.refuse(argument, "of the output's axes at most", describe(x));
        TensorView wide = with_axes(x, axes);
        for (int i = 0; i < axes; ++i) {
            if (wide.shape[i] == shape[i]) continue;
            if (wide.shape[i] != 1) check_.refuse(argument, "of sizes that broadcast to the output's", describe(x));
            wide.shape[i] = shape[i];
            wide.strides[i] = 0;
        }
        return wide;
    }

    void check_contents() const {
        const auto check_offsets = [&](const char* argument, const TensorView& offsets, const TensorView& tokens) {
            if (first_bad_offset(offsets, tokens.shape[0]) >= 0) check_.refuse(argument, "in order", "others");
        };
        check_offsets("kv_offsets", in_.kv_offsets, in_.k);
        if (in_.q_offsets) check_offsets("q_offsets", *in_.q_offsets, in_.q);
        if (!in_.cos) return;
        if (in_.q_offsets || in_.positions_q || in_.positions_k) check_.refuse("cos", "without positions", "others");
        if (Rows(in_.kv_offsets, in_.k.shape[0]).longest() > in_.cos->shape[0])
            check_.refuse("kv_offsets", "of rows as long as the tables at most", "longer ones");
    }

    // A new tensor like q, or of the accumulation type, and its view.
    py::object empty(const Shape& shape, TensorView& view, bool accumulates = false) const {
        static PyObject* const float32 = py::object(py::module_::import("torch").attr("float32")).release().ptr();
        static PyObject* const name = PyUnicode_InternFromString("new_empty");
        static PyObject* const keywords = py::make_tuple("dtype").release().ptr();
        const bool widened = accumulates && in_.k.dtype != DType::float64 && in_.k.dtype != DType::float32;
        const py::tuple sizes(shape.size());
        for (size_t i = 0; i < shape.size(); ++i) sizes[i] = py::int_(shape[i]);
        PyObject* const arguments[] = {lead_.ptr(), sizes.ptr(), float32};
        PyObject* const made = PyObject_VectorcallMethod(name, arguments, 2, widened ? keywords : nullptr);
        if (made == nullptr) throw py::error_already_set();
        view_.fill(view, "output", made);
        return py::reinterpret_steal<py::object>(made);
    }

    const Viewer view_;
    const Checks check_;
    py::handle lead_;
    AttentionInputs in_;
    Shape gate_shape_;
};

}  // namespace interformer
