// Checks of what a kernel is handed. Each message names the function, the argument, what was wanted and what was found.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "common/tensor_view.h"

namespace interformer {

// Becomes Python's TypeError; std::invalid_argument becomes ValueError.
struct TypeError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// An axis by its name, and its size where that is known (-1 where it is not).
struct Axis {
    const char* name;
    int64_t size = -1;
};

const char* name_of(DType dtype);
std::string describe(const TensorView& view);

// Every tensor that is checked must lie on one device.
class Checks {
  public:
    explicit Checks(const char* function, dlpack::Device device = {dlpack::kCPU, 0})
        : function_(function), device_(device) {}

    // One of the floating dtypes that kernels know.
    void floating(const char* argument, const TensorView& view) const;
    // An int32 or int64 vector.
    void index(const char* argument, const TensorView& view) const;
    // An index of at least one entry.
    void offsets(const char* argument, const TensorView& view) const;
    // Of this dtype, with these axes.
    void tensor(const char* argument, const TensorView& view, DType dtype, std::initializer_list<Axis> axes) const;
    // Of the dtype and the shape of another argument.
    void like(const char* argument, const TensorView& view, const char* other, const TensorView& model) const;
    // `like`, and without gaps: a tensor that a kernel fills.
    void gradient(const char* argument, const TensorView& view, const char* other, const TensorView& model) const;
    // Without gaps, in the order of its axes.
    void contiguous(const char* argument, const TensorView& view) const;
    // Elements of the last axis lie side by side.
    void contiguous_last_axis(const char* argument, const TensorView& view) const;
    // Anything else, once it is known to be wrong: the texts of a call that is right are never made.
    [[noreturn]] void refuse(const char* argument, const std::string& wanted, const std::string& found) const;

  private:
    void on_device(const char* argument, const TensorView& view) const;
    std::string message(const char* argument, const std::string& wanted, const std::string& found) const;

    const char* function_;
    dlpack::Device device_;
};

}  // namespace interformer
