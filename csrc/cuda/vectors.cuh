// Four neighbouring numbers of a tensor at a time: as one vector where its memory is aligned, else one by one.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/instructions.cuh"

namespace interformer {
namespace cuda {

struct Four {
    float values[4];
};

// The bits of four numbers.
template <typename T>
using FourBits = std::conditional_t<sizeof(T) == 2, uint2, uint4>;

template <typename T>
__device__ inline Four widen_four(const FourBits<T>& bits) {
    if constexpr (sizeof(T) == 4)
        return {__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z), __uint_as_float(bits.w)};
    else
        return {widen(T{static_cast<uint16_t>(bits.x)}), widen(T{static_cast<uint16_t>(bits.x >> 16)}),
                widen(T{static_cast<uint16_t>(bits.y)}), widen(T{static_cast<uint16_t>(bits.y >> 16)})};
}
template <typename T>
__device__ inline FourBits<T> narrow_four(const Four& x) {
    if constexpr (sizeof(T) == 4)
        return {__float_as_uint(x.values[0]), __float_as_uint(x.values[1]), __float_as_uint(x.values[2]),
                __float_as_uint(x.values[3])};
    else
        return {pack<T>(x.values[0], x.values[1]), pack<T>(x.values[2], x.values[3])};
}

// The numbers at `from`, of which `count` are read and the others are 0; `stride` is 1 where they are `aligned`.
template <typename T>
__device__ inline Four load_four(const T* from, int64_t stride, int count, bool aligned) {
    if (aligned) return widen_four<T>(*reinterpret_cast<const FourBits<T>*>(from));
    Four x{};
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (i < count) x.values[i] = widen(from[i * stride]);
    return x;
}

// Writes the first `count` numbers.
template <typename T>
__device__ inline void store_four(T* to, const Four& x, int count, bool aligned) {
    if (aligned) {
        *reinterpret_cast<FourBits<T>*>(to) = narrow_four<T>(x);
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (i < count) to[i] = narrow<T>(x.values[i]);
}

__device__ inline void scale(Four& x, float factor) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x.values[i] *= factor;
}

// Calls `map(i, number)` for the four in a rolled loop: the code of the map is there once. They stay in registers, each
// in the first one when its turn comes.
template <typename Map>
__device__ inline void map_four(Four& x, Four& other, Map&& map) {
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
        const Four before = x, beside = other;
        x = {before.values[1], before.values[2], before.values[3], map(before.values[0], beside.values[0])};
        other = {beside.values[1], beside.values[2], beside.values[3], beside.values[0]};
    }
}

// Whether rows of `count` numbers, one behind the other from `data` on, may be read and written as such vectors.
template <typename T>
__host__ __device__ inline bool four_aligned(const T* data, int64_t count) {
    return reinterpret_cast<uintptr_t>(data) % (4 * sizeof(T)) == 0 && count % 4 == 0;
}

}  // namespace cuda
}  // namespace interformer
