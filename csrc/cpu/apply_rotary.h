// `apply_rotary` of docs/ops.md on the CPU. Backwards it is its inverse, which is also its gradient.
#pragma once

#include <cstdint>

#include "common/rotary_call.h"

namespace interformer {

void apply_rotary(const RotaryInputs& in, const RotaryOutputs& outputs, int64_t threads);

}  // namespace interformer
