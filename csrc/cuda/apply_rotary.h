// `apply_rotary` of docs/ops.md on a GPU; backwards, its inverse, which is its gradient.
#pragma once

#include "common/rotary_call.h"
#include "cuda/stream.h"

namespace interformer {
namespace cuda {

void apply_rotary(const RotaryCall& call, const Stream& stream);

}  // namespace cuda
}  // namespace interformer
