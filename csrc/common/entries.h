// Reads a Python tuple entry by entry. One tuple of many arguments costs a third of as many arguments of a bound
// function. Included by the bindings alone.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>

#include "common/exchange.h"

namespace interformer {

// Each entry is taken once, in order, by its kind; errors name the function and the entry.
class Entries {
  public:
    Entries(const Viewer& view, const char* argument, py::handle tuple)
        : view_(view), argument_(argument), tuple_(tuple) {
        if (!PyTuple_Check(tuple.ptr())) view.refuse(argument, "a tuple", Py_TYPE(tuple.ptr())->tp_name);
    }

    void tensor(const char* name, TensorView& view) { view_.fill(view, name, next(name)); }

    void optional(const char* name, std::optional<TensorView>& view) {
        const py::handle entry = next(name);
        if (!entry.is_none()) view_.fill(view.emplace(), name, entry);
    }

    std::string text(const char* name) {
        const py::handle entry = next(name);
        Py_ssize_t size = 0;
        const char* text = PyUnicode_Check(entry.ptr()) ? PyUnicode_AsUTF8AndSize(entry.ptr(), &size) : nullptr;
        if (text == nullptr) refuse(name, "a str", entry);
        return {text, static_cast<size_t>(size)};
    }

    int64_t integer(const char* name) {
        const py::handle entry = next(name);
        int overflow = 0;
        const bool right = PyLong_Check(entry.ptr()) && !PyBool_Check(entry.ptr());
        const int64_t value = right ? PyLong_AsLongLongAndOverflow(entry.ptr(), &overflow) : 0;
        if (!right || overflow != 0) refuse(name, "an int of 64 bits", entry);
        return value;
    }

    double number(const char* name) {
        const py::handle entry = next(name);
        if (PyFloat_Check(entry.ptr())) return PyFloat_AS_DOUBLE(entry.ptr());
        refuse(name, "a float", entry);
    }

    bool boolean(const char* name) {
        const py::handle entry = next(name);
        if (!PyBool_Check(entry.ptr())) refuse(name, "a bool", entry);
        return entry.ptr() == Py_True;
    }

    // No entry may be left.
    void end() const {
        if (index_ < size()) view_.refuse(argument_, "a tuple of " + std::to_string(index_), tuple_of(size()));
    }

  private:
    Py_ssize_t size() const { return PyTuple_GET_SIZE(tuple_.ptr()); }

    py::handle next(const char* name) {
        if (index_ == size())
            view_.refuse(argument_, std::string("a tuple that goes on with ") + name, tuple_of(index_));
        return PyTuple_GET_ITEM(tuple_.ptr(), index_++);
    }

    static std::string tuple_of(Py_ssize_t size) { return "a tuple of " + std::to_string(size); }

    [[noreturn]] void refuse(const char* name, const char* wanted, py::handle entry) const {
        PyErr_Clear();
        view_.refuse(name, wanted, Py_TYPE(entry.ptr())->tp_name);
    }

    const Viewer& view_;
    const char* argument_;
    py::handle tuple_;
    Py_ssize_t index_ = 0;
};

}  // namespace interformer
