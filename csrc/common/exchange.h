// Makes a TensorView of a Python tensor through the DLPack C exchange table that PyTorch puts on its tensor types. Only
// the bindings include this file.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>

#include "common/checks.h"
#include "common/tensor_view.h"

namespace interformer {

namespace py = pybind11;

// Caches the exchange tables of the last few tensor types (Tensor, Parameter, ...). A reference to each type keeps its
// address from being reused by another type. The GIL guards the cache.
class ExchangeTables {
  public:
    // Returns null where the type has no table of a version we know.
    const dlpack::ExchangeTable* find(PyTypeObject* type) {
        for (const Entry& entry : entries_)
            if (entry.type == type) return entry.table;
        const dlpack::ExchangeTable* table = look_up(type);
        if (table != nullptr) {
            Entry& oldest = entries_[next_++ % kEntries];
            Py_INCREF(type);
            Py_XDECREF(reinterpret_cast<PyObject*>(oldest.type));
            oldest = {type, table};
        }
        return table;
    }

  private:
    static constexpr unsigned kEntries = 4;

    struct Entry {
        PyTypeObject* type = nullptr;
        const dlpack::ExchangeTable* table = nullptr;
    };

    static const dlpack::ExchangeTable* look_up(PyTypeObject* type) {
        PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
        void* pointer = capsule ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : nullptr;
        Py_XDECREF(capsule);
        PyErr_Clear();
        auto* header = static_cast<dlpack::ExchangeHeader*>(pointer);
        while (header != nullptr && header->version.major != dlpack::kMajorVersion) header = header->previous;
        auto* table = reinterpret_cast<const dlpack::ExchangeTable*>(header);
        return table != nullptr && table->tensor_from_object != nullptr ? table : nullptr;
    }

    Entry entries_[kEntries];
    unsigned next_ = 0;
};

inline DType dtype_of(dlpack::DataType raw) {
    if (raw.lanes != 1) return DType::other;
    if (raw.code == dlpack::kFloat)
        return raw.bits == 32   ? DType::float32
               : raw.bits == 64 ? DType::float64
               : raw.bits == 16 ? DType::float16
                                : DType::other;
    if (raw.code == dlpack::kInt) return raw.bits == 64 ? DType::int64 : raw.bits == 32 ? DType::int32 : DType::other;
    return raw.code == dlpack::kBfloat && raw.bits == 16 ? DType::bfloat16 : DType::other;
}

// Whether PyTorch's dispatcher would hand a tensor on as it is: not one of a subclass, which may mean something else by
// its operations, nor a lazily negated view, whose memory does not show it.
inline bool is_plain(py::handle object) {
    static PyObject* const tensor = py::object(py::module_::import("torch").attr("Tensor")).release().ptr();
    static PyObject* const parameter = py::object(py::module_::import("torch.nn").attr("Parameter")).release().ptr();
    static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
    PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
    if (type != tensor && type != parameter) return false;
    const auto negated = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(object.ptr(), is_neg));
    if (!negated) throw py::error_already_set();
    return negated.ptr() == Py_False;
}

// Makes the views of one call. Errors name the function and the argument.
class Viewer {
  public:
    // With `plain_only`, tensors must be plain.
    explicit Viewer(const char* function, bool plain_only = false) : function_(function), plain_only_(plain_only) {}

    const char* function() const { return function_; }

    TensorView operator()(const char* argument, py::handle object) const {
        TensorView view;
        fill(view, argument, object);
        return view;
    }

    std::optional<TensorView> optional(const char* argument, py::handle object) const {
        std::optional<TensorView> view;
        if (!object.is_none()) fill(view.emplace(), argument, object);
        return view;
    }

    void fill(TensorView& view, const char* argument, py::handle object) const {
        const dlpack::ExchangeTable* table = tables().find(Py_TYPE(object.ptr()));
        if (table == nullptr) refuse(argument, "a torch.Tensor", type_name(object));
        if (plain_only_ && !is_plain(object)) refuse(argument, "a plain torch.Tensor", type_name(object));
        dlpack::Tensor tensor;
        if (table->tensor_from_object(object.ptr(), &tensor) != 0)
            refuse(argument, "a dense tensor in memory", type_name(object) + " (" + pending_error() + ")");
        copy(tensor, view);
        // The table takes FakeTensors, wrapper subclasses and freed storage without an error.
        if (view.data == nullptr && view.size() != 0)
            refuse(argument, "a dense tensor in memory", type_name(object) + " without memory");
        if (view.data == nullptr) view.point_at(empty_);
    }

    // PyTorch's current stream on the device of a tensor (a cudaStream_t; null on the CPU). It must be used at once.
    void* current_stream(py::handle tensor, const TensorView& view) const {
        void* stream = nullptr;
        const dlpack::ExchangeTable* table = tables().find(Py_TYPE(tensor.ptr()));
        if (table->current_work_stream(view.device.type, view.device.id, &stream) != 0)
            throw std::runtime_error(std::string(function_) + ": no current stream: " + pending_error());
        return stream;
    }

    [[noreturn]] void refuse(const char* argument, const std::string& expected, const std::string& found) const {
        throw TypeError(std::string(function_) + ": " + argument + " must be " + expected + ", found " + found);
    }

  private:
    static ExchangeTables& tables() {
        static ExchangeTables tables;
        return tables;
    }

    static void copy(const dlpack::Tensor& tensor, TensorView& view) {
        view.data = tensor.data ? static_cast<char*>(tensor.data) + tensor.byte_offset : nullptr;
        view.dtype = dtype_of(tensor.dtype);
        view.raw_type = tensor.dtype;
        view.device = tensor.device;
        view.axes = tensor.ndim;
        for (int i = 0; i < tensor.ndim && i < TensorView::kMaxAxes; ++i) {
            view.shape[i] = tensor.shape[i];
            view.strides[i] = tensor.strides[i];
        }
    }

    static std::string type_name(py::handle object) { return Py_TYPE(object.ptr())->tp_name; }

    // The first line of the pending Python error. In PyTorch's errors, a C++ backtrace follows.
    static std::string pending_error() {
        const std::string text = py::error_already_set().value().cast<py::str>();
        return text.substr(0, text.find('\n'));
    }

    alignas(64) static inline char empty_[64];  // the address of tensors without elements

    const char* function_;
    bool plain_only_;
};

// Translates the checks' `TypeError` to Python's.
inline void translate_type_errors() {
    py::register_exception_translator([](std::exception_ptr pending) {
        try {
            std::rethrow_exception(pending);
        } catch (const TypeError& error) {
            PyErr_SetString(PyExc_TypeError, error.what());
        }
    });
}

}  // namespace interformer
