// Accumulators of a warp's products, and functions over the numbers that a lane has of them.
#pragma once

#include <cuda_runtime.h>

namespace interformer {
namespace cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;

__device__ inline int lane_index() {
    return static_cast<int>(threadIdx.x) % kWarp;
}

// A 16 x 16 accumulator tile of a warp, as two `mma.m16n8k16` leave it in the lanes: a lane has the rows `lane / 4` and
// `lane / 4 + 8`, and of each the columns `2 (lane % 4)`, the next one, and both plus 8.
struct AccTile {
    float values[2][4] = {};

    // Calls `each(half, column, value)` for the numbers of this lane: half 0 is its first row, half 1 its second.
    template <typename Each>
    __device__ void for_each_half(Each&& each) {
        const int column = lane_index() % 4 * 2;
#pragma unroll
        for (int side = 0; side < 2; ++side)
#pragma unroll
            for (int i = 0; i < 4; ++i) each(i / 2, column + side * 8 + i % 2, values[side][i]);
    }
    // The same, with the row's number instead of the half.
    template <typename Each>
    __device__ void for_each(Each&& each) {
        const int row = lane_index() / 4;
        for_each_half([&](int half, int column, float& x) { each(row + half * 8, column, x); });
    }
    __device__ void operator+=(const AccTile& other) {
#pragma unroll
        for (int side = 0; side < 2; ++side)
#pragma unroll
            for (int i = 0; i < 4; ++i) values[side][i] += other.values[side][i];
    }
};

// ---------------------------------------------------------------- tiles side by side

// Calls `each(half, column, number)` for the numbers that this lane has of N tiles side by side.
template <int N, typename Each>
__device__ inline void for_each(AccTile (&acc)[N], Each&& each) {
#pragma unroll
    for (int n = 0; n < N; ++n)
        acc[n].for_each_half([&](int half, int column, float& x) { each(half, n * 16 + column, x); });
}

// Calls `each(half, column, first, second)` for numbers of two such rows of tiles at the same place.
template <int N, typename Each>
__device__ inline void for_each_pair(AccTile (&first)[N], AccTile (&second)[N], Each&& each) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
        int i = 0;
        first[n].for_each_half([&](int half, int column, float& x) {
            each(half, n * 16 + column, x, second[n].values[i / 4][i % 4]);
            ++i;
        });
    }
}

// Calls `loop()` while COUNT pairs of numbers, `first(i)` and `second(i)`, lie in this lane's column of shared memory.
// A rolled loop over them there holds the code of its body once, not once for each number.
template <int COUNT, typename First, typename Second, typename Loop>
__device__ inline void in_scratch(float2* scratch, First&& first, Second&& second, Loop&& loop) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) scratch[i * kWarp] = make_float2(first(i), second(i));
    loop();
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        const float2 pair = scratch[i * kWarp];
        first(i) = pair.x;
        second(i) = pair.y;
    }
}
// The same for neighbours of a row of tiles, `4 * N` pairs.
template <int N, typename Loop>
__device__ inline void in_scratch(AccTile (&acc)[N], float2* scratch, Loop&& loop) {
    in_scratch<4 * N>(
        scratch, [&](int i) -> float& { return acc[i / 4].values[i / 2 % 2][i % 2 * 2]; },
        [&](int i) -> float& { return acc[i / 4].values[i / 2 % 2][i % 2 * 2 + 1]; }, loop);
}
// The same for numbers at the same place of two rows of tiles, `8 * N` pairs.
template <int N, typename Loop>
__device__ inline void in_scratch(AccTile (&first)[N], AccTile (&second)[N], float2* scratch, Loop&& loop) {
    in_scratch<8 * N>(
        scratch, [&](int i) -> float& { return first[i / 8].values[i / 4 % 2][i % 4]; },
        [&](int i) -> float& { return second[i / 8].values[i / 4 % 2][i % 4]; }, loop);
}

// Calls `map(number)` for each number, two at a time.
template <int N, typename Map>
__device__ inline void map_rolled(AccTile (&acc)[N], float2* scratch, Map&& map) {
    in_scratch(acc, scratch, [&] {
#pragma unroll 1
        for (int i = 0; i < 4 * N; ++i) {
            float2 pair = scratch[i * kWarp];
            map(pair.x);
            map(pair.y);
            scratch[i * kWarp] = pair;
        }
    });
}
// The same for numbers at the same place of two rows of tiles, `map(first, second)`.
template <int N, typename Map>
__device__ inline void map_rolled(AccTile (&first)[N], AccTile (&second)[N], float2* scratch, Map&& map) {
    in_scratch(first, second, scratch, [&] {
#pragma unroll 1
        for (int i = 0; i < 8 * N; ++i) {
            float2 pair = scratch[i * kWarp];
            map(pair.x, pair.y);
            scratch[i * kWarp] = pair;
        }
    });
}

// Calls `map(half, column, number)` for each number, one at a time: it takes the fewest registers.
template <int N, typename Map>
__device__ inline void map_each(AccTile (&acc)[N], float2* scratch, Map&& map) {
    const int lane_column = lane_index() % 4 * 2;
    in_scratch(acc, scratch, [&] {
#pragma unroll 1
        for (int i = 0; i < 8 * N; ++i) {
            float& x = reinterpret_cast<float*>(scratch + i / 2 * kWarp)[i % 2];
            x = map(i / 2 % 2, i / 4 * 8 + lane_column + i % 2, x);
        }
    });
}
// Calls `map(half, column, numbers)` for neighbours, in columns `column` and the next.
template <int N, typename Map>
__device__ inline void map_neighbours(AccTile (&acc)[N], float2* scratch, Map&& map) {
    const int lane_column = lane_index() % 4 * 2;
    in_scratch(acc, scratch, [&] {
#pragma unroll 1
        for (int i = 0; i < 4 * N; ++i) {
            const float2 pair = scratch[i * kWarp];
            float x[2] = {pair.x, pair.y};
            map(i % 2, i / 2 * 8 + lane_column, x);
            scratch[i * kWarp] = make_float2(x[0], x[1]);
        }
    });
}
// The same for two such rows of tiles, `map(half, column, first, second)`.
template <int N, typename Map>
__device__ inline void map_neighbours(AccTile (&first)[N], AccTile (&second)[N], float2* scratch, Map&& map) {
    const int lane_column = lane_index() % 4 * 2;
    in_scratch(first, second, scratch, [&] {
#pragma unroll 1
        for (int i = 0; i < 8 * N; i += 2) {
            const float2 left = scratch[i * kWarp], right = scratch[(i + 1) * kWarp];
            float x[2] = {left.x, right.x}, y[2] = {left.y, right.y};
            map(i / 2 % 2, i / 4 * 8 + lane_column, x, y);
            scratch[i * kWarp] = make_float2(x[0], y[0]);
            scratch[(i + 1) * kWarp] = make_float2(x[1], y[1]);
        }
    });
}

// ---------------------------------------------------------------- reductions over lanes

// The same number, by way of a shuffle: the compiler cannot see how it is made, and keeps it in a register, where it
// would make it anew at every use.
template <typename T>
__device__ inline T opaque(T x) {
    return __shfl_sync(kAllLanes, x, lane_index());
}
template <typename T>
__device__ inline T* opaque(T* x) {
    return reinterpret_cast<T*>(opaque(reinterpret_cast<unsigned long long>(x)));
}

// Sum and maximum over the four lanes that share a row of an accumulator tile.
__device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(kAllLanes, x, 1);
    return x + __shfl_xor_sync(kAllLanes, x, 2);
}
__device__ inline float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
    return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

// Sum over all lanes of a warp.
__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
    return x;
}

}  // namespace cuda
}  // namespace interformer
