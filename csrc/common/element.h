// Element types and their accumulation types. cpu/kernels/elements.h and cuda/instructions.cuh convert between them.
#pragma once

#include <cstdint>

#include "common/tensor_view.h"

namespace interformer {

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

// The accumulation type: float, or double for double.
template <typename T>
struct Accumulator {
    using type = float;
};
template <>
struct Accumulator<double> {
    using type = double;
};
template <typename T>
using Acc = typename Accumulator<T>::type;

template <typename T>
constexpr DType dtype_for = DType::other;
template <>
constexpr DType dtype_for<float> = DType::float32;
template <>
constexpr DType dtype_for<double> = DType::float64;
template <>
constexpr DType dtype_for<BFloat16> = DType::bfloat16;
template <>
constexpr DType dtype_for<Float16> = DType::float16;

// Calls `function` with a value of the element type of this dtype, whose type it uses.
template <typename Function>
void with_element_type(DType dtype, Function&& function) {
    switch (dtype) {
        case DType::float32:
            return function(float{});
        case DType::float64:
            return function(double{});
        case DType::bfloat16:
            return function(BFloat16{});
        case DType::float16:
            return function(Float16{});
        default:
            return;  // the callers check the dtype first, with the argument's name
    }
}

}  // namespace interformer
