// Reads Python tuples, entry by entry, into the structs of calls. Passing one tuple costs a third of passing its
// entries as arguments of a bound function. Only the bindings include this file.
//
// Each struct has a function `read(next, struct)` beside it, which asks `next` for the entries in their order:
// `Entries` takes them from a tuple, `EntryNames` records their names.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/exchange.h"

namespace interformer {

// Takes each entry once, in order, by its kind. Errors name the function and the entry.
class Entries {
  public:
    Entries(const Viewer& view, const char* argument, py::handle tuple)
        : view_(view), argument_(argument), tuple_(tuple) {
        if (!PyTuple_Check(tuple.ptr())) view.refuse(argument, "a tuple", Py_TYPE(tuple.ptr())->tp_name);
    }

    void tensor(const char* name, TensorView& view) {
        const py::handle entry = next(name);
        view_.fill(view, name, entry);
        if (!first_tensor_) first_tensor_ = entry;
    }

    void optional(const char* name, std::optional<TensorView>& view) {
        const py::handle entry = next(name);
        if (!entry.is_none()) view_.fill(view.emplace(), name, entry);
    }

    // A str, parsed.
    template <typename Value>
    Value choice(const char* name, Value (*parse)(const std::string&)) {
        const py::handle entry = next(name);
        Py_ssize_t size = 0;
        const char* text = PyUnicode_Check(entry.ptr()) ? PyUnicode_AsUTF8AndSize(entry.ptr(), &size) : nullptr;
        if (text == nullptr) refuse(name, "a str", entry);
        return parse({text, static_cast<size_t>(size)});
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

    // Returns whether a number was given, and not None.
    bool optional_number(const char* name, double& value) {
        if (index_ < size() && PyTuple_GET_ITEM(tuple_.ptr(), index_) == Py_None) return ++index_, false;
        value = number(name);
        return true;
    }

    bool boolean(const char* name) {
        const py::handle entry = next(name);
        if (!PyBool_Check(entry.ptr())) refuse(name, "a bool", entry);
        return entry.ptr() == Py_True;
    }

    // The first entry that is a tensor in every call.
    py::handle first_tensor() const { return first_tensor_; }

    // Refuses further entries.
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

    [[noreturn]] void refuse(const char* name, const char* expected, py::handle entry) const {
        PyErr_Clear();
        view_.refuse(name, expected, Py_TYPE(entry.ptr())->tp_name);
    }

    const Viewer& view_;
    const char* argument_;
    py::handle tuple_, first_tensor_;
    Py_ssize_t index_ = 0;
};

class EntryNames {
  public:
    void tensor(const char* name, TensorView&) { record(name); }
    void optional(const char* name, std::optional<TensorView>&) { record(name); }
    template <typename Value>
    Value choice(const char* name, Value (*)(const std::string&)) {
        record(name);
        return {};
    }
    int64_t integer(const char* name) {
        record(name);
        return 0;
    }
    double number(const char* name) {
        record(name);
        return 0;
    }
    bool optional_number(const char* name, double&) {
        record(name);
        return true;
    }
    bool boolean(const char* name) {
        record(name);
        return false;
    }

    std::vector<std::string> names() { return std::move(names_); }

  private:
    void record(const char* name) { names_.emplace_back(name); }

    std::vector<std::string> names_;
};

template <typename Struct>
Struct from_tuple(const Viewer& view, const char* argument, py::handle tuple, py::handle* first_tensor = nullptr) {
    Entries next(view, argument, tuple);
    Struct in{};
    read(next, in);
    next.end();
    if (first_tensor) *first_tensor = next.first_tensor();
    return in;
}

template <typename Struct>
std::vector<std::string> field_names() {
    EntryNames next;
    Struct in{};
    read(next, in);
    return next.names();
}

}  // namespace interformer
