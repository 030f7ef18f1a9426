// Rotary tables and positions: checked, and as the kernels see them.
#pragma once

#include <cstdint>
#include <optional>

#include "common/checks.h"
#include "cpu/row_tensor.h"

namespace interformer {

// Tables float32 [P, R/2] with P >= 1 and R <= head_size.
inline void check_rotary(const Checks& check, const TensorView& cos, const TensorView& sin, int64_t head_size) {
    check.tensor("cos", cos, DType::float32, {{"P"}, {"R/2"}});
    check.contiguous_last_axis("cos", cos);
    check.tensor("sin", sin, DType::float32, {{"P", cos.shape[0]}, {"R/2", cos.shape[1]}});
    check.contiguous_last_axis("sin", sin);
    if (cos.shape[0] < 1 || 2 * cos.shape[1] > head_size)
        check.refuse("cos", "[P, R/2] with P >= 1 and R <= D", describe(cos));
}

// One position for each token, where given.
inline void check_positions(const Checks& check, const char* argument, const std::optional<TensorView>& positions,
                            int64_t tokens) {
    if (!positions) return;
    check.index(argument, *positions);
    if (positions->shape[0] != tokens) check.refuse(argument, "one for each token", describe(*positions));
}

inline RotaryTables rotary_tables(const TensorView& cos, const TensorView& sin, bool interleaved) {
    return {static_cast<const float*>(cos.data),
            static_cast<const float*>(sin.data),
            cos.strides[0],
            sin.strides[0],
            cos.shape[0],
            cos.shape[1],
            interleaved};
}

inline Positions positions_of(const std::optional<TensorView>& x) {
    if (!x) return {};
    if (x->dtype == DType::int32) return {static_cast<const int32_t*>(x->data), nullptr, x->strides[0]};
    return {nullptr, static_cast<const int64_t*>(x->data), x->strides[0]};
}

}  // namespace interformer
