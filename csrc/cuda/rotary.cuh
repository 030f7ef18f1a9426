// The rotation of a pair of channels, the same for all kernels.
#pragma once

#include <cuda_runtime.h>

namespace interformer {
namespace cuda {

// As explicit fma: which product of a sum is rounded must not be left to the compiler, for attention that rotates
// inside and attention of tokens that were rotated before have the same bits.
__device__ inline void rotate_pair(float& x, float& y, float cos, float sin) {
    const float first = fmaf(x, cos, -(y * sin));
    y = fmaf(y, cos, x * sin);
    x = first;
}

}  // namespace cuda
}  // namespace interformer
