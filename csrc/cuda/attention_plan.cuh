// The launch heuristic: how many warps work together, from sizes alone, and which padded head size serves a call.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/attention.h"
#include "cuda/attention_tiles.cuh"

namespace interformer {
namespace cuda {

// The padded numbers of channels for which there are kernels with options: fewer, since there are many kernels.
template <int WIDTH>
constexpr bool kServesOptions = WIDTH != 16;

// Blocks of kMaxWarps warps that a multiprocessor shall hold, for kernels with options.
constexpr int kOptionBlocks = 2;

// Calls `function` with the padded number of channels of this call's heads, as a type.
template <typename Function>
void with_width(const AttentionInputs& in, const Options& options, Function&& function) {
    const int64_t widest = std::max(in.k.shape[2], (in.v ? *in.v : in.k).shape[2]);
    if (widest <= 16 && !options.any) return function(std::integral_constant<int, 16>{});
    if (widest <= 32) return function(std::integral_constant<int, 32>{});
    if (widest <= 64) return function(std::integral_constant<int, 64>{});
    if (widest <= 128) return function(std::integral_constant<int, 128>{});
    return function(std::integral_constant<int, kMaxChannels>{});
}

// Inputs of the heuristic: mean number of stationary and of streamed rows in a row of the batch, and the contents of
// shared memory.
struct Shape {
    int64_t mean_stationary, mean_streamed;
    Contents contents;
};

template <typename T, int WIDTH>
constexpr int memory_of(const Shape& shape, int warps, int stages) {
    const int staged = warps * kStationary * AttentionTiles<T, WIDTH>::kStaged * static_cast<int>(sizeof(float));
    return kNextItemBytes + std::max(SharedLayout::of<T, WIDTH>(warps, stages, shape.contents).bytes(), staged);
}

// As `blocks_for`: two stationary operands and two tiles of scores take more registers.
template <typename T>
constexpr int query_blocks_for(int width) {
    return sizeof(T) == 2 && width <= 64 ? 3 : 2;
}

// Warps work together where rows are long enough for two warps or more: then streamed tiles are read once for all of
// them. Sets all but the slots and their items. No choice here changes a bit of the results.
template <typename T, int WIDTH>
Plan plan_of(const Shape& shape) {
    using Tiles = AttentionTiles<T, WIDTH>;
    static_assert(memory_of<T, WIDTH>({0, 0, {true, true, true, true}}, 1, 1) <= kMaxSharedMemory);
    Plan plan{};
    plan.warp_per_tile = shape.mean_stationary <= 2 * kStationary;
    plan.warps = plan.warp_per_tile || shape.mean_stationary > 3 * kStationary ? kMaxWarps : 2;
    plan.stages = shape.mean_streamed > Tiles::kStreamed ? 2 : 1;
    const auto bytes = [&] {
        plan.memory = memory_of<T, WIDTH>(shape, plan.warp_per_tile ? 1 : plan.warps, plan.stages);
        return plan.shared();
    };
    while (bytes() > kMaxSharedMemory && plan.warps > 1) plan.warps /= 2;
    while (bytes() > kMaxSharedMemory) --plan.stages;
    return plan;
}

}  // namespace cuda
}  // namespace interformer
