// `apply_rotary` of docs/ops.md on a GPU. Backwards it is the inverse, which is also the gradient.
#pragma once

#include "common/rotary_call.h"
#include "cuda/stream.h"

namespace interformer {
namespace cuda {

void apply_rotary(const RotaryInputs& in, const RotaryOutputs& outputs, const Stream& stream);

}  // namespace cuda
}  // namespace interformer
