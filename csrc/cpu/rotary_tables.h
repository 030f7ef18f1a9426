// Rotary tables and positions as the kernels see them.
#pragma once

#include <cstdint>
#include <optional>

#include "common/tensor_view.h"
#include "cpu/row_tensor.h"

namespace interformer {

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
