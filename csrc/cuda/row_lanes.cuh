// How the lanes of a warp share numbers that lie side by side (the heads of a token, the channels of a head): as many
// lanes as there are such numbers, up to a warp, rounded up to a power of two. Groups of so many lanes take one token
// each.
#pragma once

#include <cstdint>

#include "cuda/acc_tile.cuh"

namespace interformer {
namespace cuda {

// Lanes of a group.
inline int lanes_for(int64_t numbers) {
    int lanes = 1;
    while (lanes < numbers && lanes < kWarp) lanes *= 2;
    return lanes;
}

// Sum, or maximum, of a number over the groups of a warp; each lane gets that of its place in its group.
__device__ inline float sum_of_groups(float x, int lanes) {
    for (int step = kWarp / 2; step >= lanes; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
    return x;
}
__device__ inline float max_of_groups(float x, int lanes) {
    for (int step = kWarp / 2; step >= lanes; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
    return x;
}

// Sum of a number over the lanes of each group.
__device__ inline float sum_in_group(float x, int lanes) {
    for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
    return x;
}

}  // namespace cuda
}  // namespace interformer
