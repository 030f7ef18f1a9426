// OPS.md's `apply_rotary` on the CPU; backwards, its inverse, which is its gradient.
#pragma once

#include <cstdint>
#include <optional>

#include "common/tensor_view.h"

namespace interformer {

void apply_rotary(const TensorView& x, const TensorView& offsets, const TensorView& cos, const TensorView& sin,
                  const std::optional<TensorView>& positions, bool interleaved, bool backwards, const TensorView& out,
                  int64_t threads);

}  // namespace interformer
