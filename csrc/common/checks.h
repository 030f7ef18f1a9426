// Checks of the arguments of a kernel. Each message names the function and the argument, and says what was expected and
// what was found.
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

// The name of an axis, and its size where it is known (else -1).
struct Axis {
    const char* name;
    int64_t size = -1;
};

const char* name_of(DType dtype);
std::string describe(const TensorView& view);

// The checks of one call. All of its tensors must be on one device.
class Checks {
  public:
    explicit Checks(const char* function, dlpack::Device device = {dlpack::kCPU, 0})
        : function_(function), device_(device) {}

    // The view has one of the floating dtypes that kernels know.
    void floating(const char* argument, const TensorView& view) const;
    // The view is an int32 or int64 vector.
    void index(const char* argument, const TensorView& view) const;
    // The view is an `index` with at least one entry.
    void offsets(const char* argument, const TensorView& view) const;
    // The view has this dtype and these axes.
    void tensor(const char* argument, const TensorView& view, DType dtype, std::initializer_list<Axis> axes) const;
    // The view has the dtype and the shape of another argument.
    void like(const char* argument, const TensorView& view, const char* other, const TensorView& model) const;
    // `like` and `contiguous`: a gradient that a kernel writes.
    void gradient(const char* argument, const TensorView& view, const char* other, const TensorView& model) const;
    // The view is contiguous in memory, in the order of its axes.
    void contiguous(const char* argument, const TensorView& view) const;
    // Elements of the last axis lie side by side.
    void contiguous_last_axis(const char* argument, const TensorView& view) const;
    // Throws for any other reason. Callers check first, so that a valid call builds no text.
    [[noreturn]] void refuse(const char* argument, const std::string& expected, const std::string& found) const;

  private:
    void on_device(const char* argument, const TensorView& view) const;
    std::string message(const char* argument, const std::string& expected, const std::string& found) const;

    const char* function_;
    dlpack::Device device_;
};

}  // namespace interformer
