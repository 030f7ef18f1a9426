// Element types of the CUDA kernels, and the alignment of a tensor's memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "common/checks.h"
#include "common/element.h"

namespace interformer {
namespace cuda {

// A float32 number that tensor cores may round to 10 bits of fraction before they multiply it.
struct Tf32 {
    float value;
};

// The largest finite number.
template <typename T>
constexpr float kLargest = 3.4028234663852886e38f;
template <>
inline constexpr float kLargest<BFloat16> = 3.3895313892515355e38f;
template <>
inline constexpr float kLargest<Float16> = 65504.0f;

// Calls `function` with a value whose type is the element type of this dtype.
template <typename Function>
void with_element(DType dtype, Function&& function) {
    switch (dtype) {
        case DType::float32:
            return function(float{});
        case DType::bfloat16:
            return function(BFloat16{});
        case DType::float16:
            return function(Float16{});
        default:
            throw TypeError(std::string("CUDA kernels serve float32, bfloat16 and float16, found ") + name_of(dtype));
    }
}

// The same, with Tf32 for float32 where that is allowed.
template <typename Function>
void with_element(DType dtype, bool tf32, Function&& function) {
    if (tf32 && dtype == DType::float32) return function(Tf32{});
    with_element(dtype, function);
}

// The largest alignment (16, 8, 4 or 2 bytes) that every vector along the last axis has, and that divides its bytes.
inline int alignment_of(const TensorView& x) {
    const int64_t size = x.dtype == DType::float32 ? 4 : 2;
    uint64_t bits = reinterpret_cast<uintptr_t>(x.data) | static_cast<uint64_t>(x.shape[x.axes - 1] * size) | 16;
    for (int axis = 0; axis + 1 < x.axes; ++axis)
        if (x.shape[axis] > 1) bits |= static_cast<uint64_t>(x.strides[axis] * size);
    return static_cast<int>(bits & -bits);
}

// The alignment by which a tensor is copied, line by line along an axis. Copies of 16 bytes compute distances of 64
// lines in 32 bits: where lines are further apart, they are copied by 8 bytes at most.
inline int copy_alignment(const TensorView& x, int axis) {
    const int64_t size = x.dtype == DType::float32 ? 4 : 2;
    return std::min(alignment_of(x), x.strides[axis] * size < int64_t{1} << 26 ? 16 : 8);
}

}  // namespace cuda
}  // namespace interformer
