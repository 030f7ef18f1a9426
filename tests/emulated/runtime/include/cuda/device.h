// The twin of csrc/cuda/device.h: kernels reach the CPU's memory.
#pragma once

#include "common/tensor_view.h"

namespace interformer {
namespace cuda {

constexpr dlpack::DeviceType kMemory = dlpack::kCPU;

}  // namespace cuda
}  // namespace interformer
