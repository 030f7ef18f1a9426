// Tiles of numbers in shared memory, and their products by one warp, for every element type alike.
//
// Products go in steps of 16 x 16 x 16. A warp's sums lie in its lanes as `mma.m16n8k16` leaves them: see `Sums`.
// 16-bit operands are fragments of that instruction. float32 is multiplied by ordinary instructions: each lane has the
// two rows of the left operand that it sums for, and reads its columns of the right one where they lie in shared
// memory; so a right operand is used before its tile changes. Whoever masks, scales or stores sums need not know which.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/instructions.cuh"

namespace interformer {
namespace cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;

__device__ inline int lane_index() {
    return static_cast<int>(threadIdx.x) % kWarp;
}

// ---------------------------------------------------------------- shared memory

// Bytes that a block may have on every device from compute capability 8.0 on (that of 8.6 has least).
constexpr int kMostSharedMemory = 101376;

// ROWS x COLUMNS numbers; rows are 16 bytes longer than their columns, so that 8 rows lie in different banks.
template <typename T, int ROWS, int COLUMNS>
struct Tile {
    static_assert(ROWS % 16 == 0 && COLUMNS % 16 == 0, "products go in steps of 16");
    static constexpr int kColumns = COLUMNS;
    static constexpr int kStride = COLUMNS + 16 / static_cast<int>(sizeof(T));
    static constexpr int kBytes = ROWS * kStride * static_cast<int>(sizeof(T));

    T* data;

    __device__ T* at(int row, int column) const { return data + row * kStride + column; }
};

// Tiles of one kind that are filled and used in turns.
template <typename Tile, int COUNT>
struct Stages {
    static constexpr int kBytes = COUNT * Tile::kBytes;

    Tile first;

    __device__ Tile operator[](int i) const {
        return {first.data + i * (Tile::kBytes / static_cast<int>(sizeof(*first.data)))};
    }
};

// Hands out the shared memory of the block, piece by piece; all threads take the same pieces in the same order.
class SharedMemory {
  public:
    __device__ SharedMemory() : next_(shared_memory()) {}

    template <typename Tile>
    __device__ Tile tile() {
        return {reinterpret_cast<decltype(Tile::data)>(bytes(Tile::kBytes))};
    }
    template <typename Tile, int COUNT>
    __device__ Stages<Tile, COUNT> stages() {
        return {{reinterpret_cast<decltype(Tile::data)>(bytes(Stages<Tile, COUNT>::kBytes))}};
    }
    template <typename T>
    __device__ T* numbers(int count) {
        return reinterpret_cast<T*>(bytes(count * static_cast<int>(sizeof(T))));
    }

  private:
    __device__ char* bytes(int count) {
        char* here = next_;
        next_ += (count + 15) / 16 * 16;
        return here;
    }

    char* next_;
};

// Threads that do something together, as this one sees them.
struct Team {
    int index, size;
};
__device__ inline Team block_team() {
    return {static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)};
}
__device__ inline Team warp_team() {
    return {lane_index(), kWarp};
}

// ---------------------------------------------------------------- copies

// The first `bytes` of 16 bytes, zeros behind them, from memory that is aligned to `alignment` < 16 bytes.
template <typename T>
__device__ inline void start_small_copies(T* to, const T* from, int bytes, int alignment) {
    char* target = reinterpret_cast<char*>(to);
    const char* source = reinterpret_cast<const char*>(from);
    if (alignment == 8) {
        start_copy<8>(target, source, min(bytes, 8));
        start_copy<8>(target + 8, bytes > 8 ? source + 8 : source, max(bytes - 8, 0));
    } else if (alignment == 4) {
        for (int i = 0; i < 16; i += 4)
            start_copy<4>(target + i, bytes > i ? source + i : source, min(max(bytes - i, 0), 4));
    } else {
        const int count = bytes / static_cast<int>(sizeof(T));
        for (int i = 0; i < 16 / static_cast<int>(sizeof(T)); ++i) to[i] = i < count ? from[i] : T{};
    }
}

// Starts the copy of a tile: its row `r` from `columns` numbers at `source(r)` (null: zeros), with zeros behind them.
// `alignment` is what `alignment_of` says. Ends by `close_copies`, `wait_copies` and a barrier.
template <typename T, int ROWS, int COLUMNS, typename Source>
__device__ inline void start_tile(Tile<T, ROWS, COLUMNS> to, int columns, int alignment, Team team, Source&& source) {
    constexpr int kChunk = 16 / static_cast<int>(sizeof(T)), kChunks = COLUMNS / kChunk;
    const auto chunk = [&](int i, auto&& start) {
        const int row = i / kChunks, column = i % kChunks * kChunk;
        const T* from = source(row);
        const int count = from == nullptr ? 0 : min(columns - column, kChunk);
        T* target = to.at(row, column);
        if (count <= 0)
            *reinterpret_cast<uint4*>(target) = uint4{0, 0, 0, 0};
        else
            start(target, from + column, count * static_cast<int>(sizeof(T)));
    };
    if (alignment >= 16) {
        for (int i = team.index; i < ROWS * kChunks; i += team.size)
            chunk(i, [](T* target, const T* from, int bytes) { start_copy<16>(target, from, bytes); });
        return;
    }
#pragma unroll 1
    for (int i = team.index; i < ROWS * kChunks; i += team.size)
        chunk(i, [&](T* target, const T* from, int bytes) { start_small_copies(target, from, bytes, alignment); });
}

// ---------------------------------------------------------------- products

// A 16 x 16 block of sums over a warp: a lane has the rows `lane / 4` and 8 further, and of each the columns
// `2 (lane % 4)`, the next, and both 8 further.
struct Sums {
    float values[2][4] = {};

    // Calls `each(half, column, value)` for what this lane has: half 0 is its first row, 1 the one 8 further.
    template <typename Each>
    __device__ void for_each_half(Each&& each) {
        const int column = lane_index() % 4 * 2;
#pragma unroll
        for (int side = 0; side < 2; ++side)
#pragma unroll
            for (int i = 0; i < 4; ++i) each(i / 2, column + side * 8 + i % 2, values[side][i]);
    }
    __device__ void operator+=(const Sums& others) {
#pragma unroll
        for (int side = 0; side < 2; ++side)
#pragma unroll
            for (int i = 0; i < 4; ++i) values[side][i] += others.values[side][i];
    }
    // The same by the number of the row.
    template <typename Each>
    __device__ void for_each(Each&& each) {
        const int row = lane_index() / 4;
        for_each_half([&](int half, int column, float& x) { each(row + half * 8, column, x); });
    }
};

// Rows of the left operand of a 16 x 16 x 16 product.
template <typename T>
struct LeftOperand {
    uint32_t parts[4];
};
template <>
struct LeftOperand<float> {
    float rows[2][16];
};
// [half of the places][row, or row + 8, of the first place, then of the second]
template <>
struct LeftOperand<Tf32> {
    uint32_t parts[2][4];
};

// Columns of the right one.
template <typename T>
struct RightOperand {
    uint32_t parts[4];
};
template <>
struct RightOperand<float> {
    const float* first;  // of this lane
    int stride;
    bool by_rows;
};
// [half of the places][half of the columns][place]
template <>
struct RightOperand<Tf32> {
    uint32_t parts[2][2][2];
};

// Of Tf32 operands: `number(row, place)` of each that this lane has.
template <typename Number>
__device__ inline void fill(LeftOperand<Tf32>& to, Number&& number) {
    const int row = lane_index() / 4, place = lane_index() % 4 * 2;
#pragma unroll
    for (int i = 0; i < 8; ++i)
        to.parts[i / 4][i % 4] = shortened(number(row + i % 2 * 8, place + i / 4 * 8 + i / 2 % 2));
}
template <typename Number>
__device__ inline void fill(RightOperand<Tf32>& to, Number&& number) {
    const int column = lane_index() / 4, place = lane_index() % 4 * 2;
#pragma unroll
    for (int i = 0; i < 8; ++i)
        to.parts[i / 4][i / 2 % 2][i % 2] = shortened(number(place + i / 4 * 8 + i % 2, column + i / 2 % 2 * 8));
}

// Rows [row, row + 16) of the left operand and 16 places of the sum from `k` on, out of a tile of rows.
template <typename T, int ROWS, int COLUMNS>
__device__ inline void load_left(LeftOperand<T>& to, Tile<T, ROWS, COLUMNS> tile, int row, int k) {
    const int lane = lane_index();
    if constexpr (std::is_same_v<T, Tf32>) {
        fill(to, [&](int i, int place) { return widen(*tile.at(row + i, k + place)); });
    } else if constexpr (std::is_same_v<T, float>) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float4 four = *reinterpret_cast<const float4*>(tile.at(row + lane / 4 + i / 4 * 8, k + i % 4 * 4));
            to.rows[i / 4][i % 4 * 4] = four.x;
            to.rows[i / 4][i % 4 * 4 + 1] = four.y;
            to.rows[i / 4][i % 4 * 4 + 2] = four.z;
            to.rows[i / 4][i % 4 * 4 + 3] = four.w;
        }
    } else {
        load_matrices(to.parts, tile.at(row + lane % 16, k + lane / 16 * 8));
    }
}

// The same out of a tile whose rows are places of the sum: the tile's transpose is the operand.
template <typename T, int ROWS, int COLUMNS>
__device__ inline void load_left_turned(LeftOperand<T>& to, Tile<T, ROWS, COLUMNS> tile, int row, int k) {
    const int lane = lane_index();
    if constexpr (std::is_same_v<T, Tf32>) {
        fill(to, [&](int i, int place) { return widen(*tile.at(k + place, row + i)); });
    } else if constexpr (std::is_same_v<T, float>) {
#pragma unroll
        for (int i = 0; i < 32; ++i) to.rows[i / 16][i % 16] = *tile.at(k + i % 16, row + lane / 4 + i / 16 * 8);
    } else {
        load_matrices_turned(to.parts, tile.at(k + lane / 16 * 8 + lane % 8, row + lane / 8 % 2 * 8));
    }
}

// Sums as a left operand: their columns become places of the next sum.
template <typename T>
__device__ inline void as_left(LeftOperand<T>& to, const Sums& sums) {
    if constexpr (std::is_same_v<T, Tf32>) {
#pragma unroll
        for (int i = 0; i < 8; ++i) to.parts[i / 4][i % 4] = shortened(sums.values[i / 4][i % 2 * 2 + i / 2 % 2]);
    } else if constexpr (std::is_same_v<T, float>) {
        const int quad = lane_index() / 4 * 4;
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    to.rows[i / 2][half * 8 + j * 2 + i % 2] = __shfl_sync(kAllLanes, sums.values[half][i], quad + j);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            to.parts[i] = pack<T>(sums.values[i / 2][i % 2 * 2], sums.values[i / 2][i % 2 * 2 + 1]);
    }
}

// Columns [column, column + 16) of the right operand and 16 places of the sum, out of a tile whose rows are places of
// the sum.
template <typename T, int ROWS, int COLUMNS>
__device__ inline void load_right(RightOperand<T>& to, Tile<T, ROWS, COLUMNS> tile, int k, int column) {
    const int lane = lane_index();
    if constexpr (std::is_same_v<T, Tf32>)
        fill(to, [&](int place, int j) { return widen(*tile.at(k + place, column + j)); });
    else if constexpr (std::is_same_v<T, float>)
        to = {tile.at(k, column + lane % 4 * 2), tile.kStride, true};
    else
        load_matrices_turned(to.parts, tile.at(k + lane % 16, column + lane / 16 * 8));
}

// The same out of a tile whose rows are the operand's columns: the tile's transpose is the operand.
template <typename T, int ROWS, int COLUMNS>
__device__ inline void load_right_turned(RightOperand<T>& to, Tile<T, ROWS, COLUMNS> tile, int k, int column) {
    const int lane = lane_index();
    if constexpr (std::is_same_v<T, Tf32>)
        fill(to, [&](int place, int j) { return widen(*tile.at(column + j, k + place)); });
    else if constexpr (std::is_same_v<T, float>)
        to = {tile.at(column + lane % 4 * 2, k), tile.kStride, false};
    else
        load_matrices(to.parts, tile.at(column + lane / 16 * 8 + lane % 8, k + lane / 8 % 2 * 8));
}

// Four places of the sum, from `k` on, of the column pairs of this lane: [place][column].
__device__ inline void load_places(float (&to)[4][4], const RightOperand<float>& right, int k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (right.by_rows) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float2 pair = *reinterpret_cast<const float2*>(right.first + (k + i) * right.stride + half * 8);
                to[i][half * 2] = pair.x;
                to[i][half * 2 + 1] = pair.y;
            }
        } else {
            const float4 four = *reinterpret_cast<const float4*>(right.first + (i / 2 * 8 + i % 2) * right.stride + k);
            to[0][i] = four.x;
            to[1][i] = four.y;
            to[2][i] = four.z;
            to[3][i] = four.w;
        }
    }
}

// sums += left right.
template <typename T>
__device__ inline void multiply_add(Sums& sums, const LeftOperand<T>& left, const RightOperand<T>& right) {
    if constexpr (std::is_same_v<T, Tf32>) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            multiply_add_tf32(sums.values[i % 2], left.parts[i / 2], right.parts[i / 2][i % 2][0],
                              right.parts[i / 2][i % 2][1]);
    } else if constexpr (std::is_same_v<T, float>) {
#pragma unroll
        for (int k = 0; k < 16; k += 4) {
            float places[4][4];
            load_places(places, right, k);
#pragma unroll
            for (int place = 0; place < 4; ++place)
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const int half = i / 4, row = i / 2 % 2, column = i % 2;
                    float& sum = sums.values[half][row * 2 + column];
                    sum = fmaf(left.rows[row][k + place], places[place][half * 2 + column], sum);
                }
        }
    } else {
        multiply_add<T>(sums.values[0], left.parts, right.parts[0], right.parts[1]);
        multiply_add<T>(sums.values[1], left.parts, right.parts[2], right.parts[3]);
    }
}

// ---------------------------------------------------------------- along a row of sums

// The sum, and the largest, of what the four lanes that share a row hold.
__device__ inline float row_sum(float x) {
    x += __shfl_xor_sync(kAllLanes, x, 1);
    return x + __shfl_xor_sync(kAllLanes, x, 2);
}
__device__ inline float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
    return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

// The sum of what all lanes of a warp hold.
__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
    return x;
}

}  // namespace cuda
}  // namespace interformer
