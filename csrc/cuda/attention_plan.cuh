// How many warps work together in a launch, from shapes alone, and which padded head size serves a call.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/attention.h"
#include "cuda/attention_tiles.cuh"

namespace interformer {
namespace cuda {

// Calls `function` with the number of channels, as a type, that tiles for heads of this call have.
template <typename Function>
void with_width(const AttentionInputs& in, Function&& function) {
    const int64_t widest = std::max(in.k.shape[2], (in.v ? *in.v : in.k).shape[2]);
    if (widest <= 16) return function(std::integral_constant<int, 16>{});
    if (widest <= 32) return function(std::integral_constant<int, 32>{});
    if (widest <= 64) return function(std::integral_constant<int, 64>{});
    if (widest <= 128) return function(std::integral_constant<int, 128>{});
    return function(std::integral_constant<int, kMostChannels>{});
}

// What a plan follows from: rows of a warp's kind and of the others' in a row of the batch, on average, and what its
// shared memory holds.
struct Shape {
    int64_t mean_own, mean_others;
    Contents holds;
};

template <typename T, int WIDTH>
constexpr int memory_of(const Shape& shape, int warps, int stages) {
    const int finished = warps * kOwn * AttentionTiles<T, WIDTH>::kStaged * static_cast<int>(sizeof(float));
    return kToldNext + std::max(MemoryParts::of<T, WIDTH>(warps, stages, shape.holds).sum(), finished);
}

// As `blocks_for`: two operands of a warp's own and two tiles of scores take more registers.
template <typename T>
constexpr int query_blocks_for(int width) {
    return sizeof(T) == 2 && width <= 64 ? 3 : 2;
}

// Warps work together where rows are long enough for two of them or more: then others are read once for all. All but
// slots and parts is set, and no choice here changes a bit of the results.
template <typename T, int WIDTH>
Plan plan_of(const Shape& shape) {
    using Tiles = AttentionTiles<T, WIDTH>;
    static_assert(memory_of<T, WIDTH>({0, 0, {true, true, true}}, 1, 1) <= kMostSharedMemory);
    Plan plan{};
    plan.alone = shape.mean_own <= 2 * kOwn;
    plan.warps = plan.alone || shape.mean_own > 3 * kOwn ? kMostWarps : 2;
    plan.stages = shape.mean_others > Tiles::kOthers ? 2 : 1;
    const auto bytes = [&] {
        plan.memory = memory_of<T, WIDTH>(shape, plan.alone ? 1 : plan.warps, plan.stages);
        return plan.shared();
    };
    while (bytes() > kMostSharedMemory && plan.warps > 1) plan.warps /= 2;
    while (bytes() > kMostSharedMemory) --plan.stages;
    return plan;
}

}  // namespace cuda
}  // namespace interformer
