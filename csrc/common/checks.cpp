#include "common/checks.h"

#include <algorithm>

namespace interformer {

const char* name_of(DType dtype) {
    switch (dtype) {
        case DType::float32:
            return "float32";
        case DType::float64:
            return "float64";
        case DType::bfloat16:
            return "bfloat16";
        case DType::float16:
            return "float16";
        case DType::int32:
            return "int32";
        case DType::int64:
            return "int64";
        case DType::other:
            break;
    }
    return "another dtype";
}

namespace {

std::string dtype_of(const TensorView& view) {
    if (view.dtype != DType::other) return name_of(view.dtype);
    const dlpack::DataType raw = view.raw_type;
    if (raw.code == dlpack::kBool) return "bool";
    const char* kind = raw.code == dlpack::kInt       ? "int"
                       : raw.code == dlpack::kUInt    ? "uint"
                       : raw.code == dlpack::kComplex ? "complex"
                                                      : "DLPack type ";
    const std::string code = raw.code > dlpack::kComplex ? std::to_string(raw.code) + " of bits " : "";
    return kind + code + std::to_string(raw.bits);
}

std::string shape_of(const TensorView& view) {
    if (view.axes > TensorView::kMaxAxes) return "[" + std::to_string(view.axes) + " axes]";
    std::string text = "[";
    for (int i = 0; i < view.axes; ++i) text += (i ? ", " : "") + std::to_string(view.shape[i]);
    return text + "]";
}

bool same(dlpack::Device a, dlpack::Device b) {
    return on_cpu(a) ? on_cpu(b) : a.type == b.type && a.id == b.id;
}

std::string device_name(dlpack::Device device) {
    if (on_cpu(device)) return "the CPU";
    const std::string kind = device.type == dlpack::kCUDA ? "CUDA device " : "another device ";
    return kind + std::to_string(device.id);
}

bool fits(const TensorView& view, std::initializer_list<Axis> axes) {
    if (view.axes != static_cast<int>(axes.size())) return false;
    int i = 0;
    for (const Axis& axis : axes) {
        if (axis.size >= 0 && view.shape[i] != axis.size) return false;
        ++i;
    }
    return true;
}

std::string axes_text(std::initializer_list<Axis> axes) {
    std::string text = "[";
    for (const Axis& axis : axes) {
        if (text.size() > 1) text += ", ";
        text += axis.name;
        if (axis.size >= 0) text += " = " + std::to_string(axis.size);
    }
    return text + "]";
}

}  // namespace

std::string describe(const TensorView& view) {
    return dtype_of(view) + " " + shape_of(view) + " on " + device_name(view.device);
}

std::string Checks::message(const char* argument, const std::string& expected, const std::string& found) const {
    return std::string(function_) + ": " + argument + " must be " + expected + ", found " + found;
}

void Checks::refuse(const char* argument, const std::string& expected, const std::string& found) const {
    throw std::invalid_argument(message(argument, expected, found));
}

void Checks::on_device(const char* argument, const TensorView& view) const {
    if (!same(device_, view.device)) refuse(argument, "on " + device_name(device_), describe(view));
}

void Checks::floating(const char* argument, const TensorView& view) const {
    on_device(argument, view);
    switch (view.dtype) {
        case DType::float32:
        case DType::float64:
        case DType::bfloat16:
        case DType::float16:
            return;
        default:
            throw TypeError(message(argument, "float32, float64, bfloat16 or float16", describe(view)));
    }
}

void Checks::index(const char* argument, const TensorView& view) const {
    on_device(argument, view);
    if (view.dtype != DType::int32 && view.dtype != DType::int64)
        throw TypeError(message(argument, "int32 or int64", describe(view)));
    if (view.axes != 1) refuse(argument, "a vector", describe(view));
}

void Checks::offsets(const char* argument, const TensorView& view) const {
    index(argument, view);
    if (view.shape[0] < 1) refuse(argument, "[B+1] with at least one entry", describe(view));
}

void Checks::tensor(const char* argument, const TensorView& view, DType dtype, std::initializer_list<Axis> axes) const {
    on_device(argument, view);
    if (view.dtype != dtype) throw TypeError(message(argument, name_of(dtype), describe(view)));
    if (!fits(view, axes)) refuse(argument, std::string(name_of(dtype)) + " " + axes_text(axes), describe(view));
}

void Checks::like(const char* argument, const TensorView& view, const char* other, const TensorView& model) const {
    on_device(argument, view);
    if (view.dtype != model.dtype) throw TypeError(message(argument, name_of(model.dtype), describe(view)));
    const int known = std::min(view.axes, TensorView::kMaxAxes);
    if (view.axes != model.axes || !std::equal(view.shape, view.shape + known, model.shape))
        refuse(argument, std::string("of the shape of ") + other + ", " + shape_of(model), describe(view));
}

void Checks::contiguous(const char* argument, const TensorView& view) const {
    int64_t stride = 1;
    for (int axis = view.axes - 1; axis >= 0 && view.size() > 0; --axis) {
        if (view.shape[axis] > 1 && view.strides[axis] != stride)
            refuse(argument, "contiguous", "a stride of " + std::to_string(view.strides[axis]));
        stride *= view.shape[axis];
    }
}

void Checks::gradient(const char* argument, const TensorView& view, const char* other, const TensorView& model) const {
    like(argument, view, other, model);
    contiguous(argument, view);
}

void Checks::contiguous_last_axis(const char* argument, const TensorView& view) const {
    const int last = view.axes - 1;
    if (view.shape[last] > 1 && view.strides[last] != 1 && view.size() > 0)
        refuse(argument, "contiguous along its last axis", "a stride of " + std::to_string(view.strides[last]));
}

}  // namespace interformer
