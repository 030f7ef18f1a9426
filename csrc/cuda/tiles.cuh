// Tiles of numbers in shared memory, and their products by one warp, for every element type alike.
//
// Products go in steps of 16 x 16 x 16 and end in an `AccTile`, the accumulator layout of `mma.m16n8k16`. 16-bit
// operands are fragments of that instruction. float32 is multiplied by ordinary instructions: a lane holds the two rows
// of the left operand that its accumulators need, and reads its columns of the right operand in place from shared
// memory, so a right operand must be used before its tile changes. Code that masks, scales or stores accumulators is
// the same for all types.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/acc_tile.cuh"
#include "cuda/instructions.cuh"

namespace interformer {
namespace cuda {

// ---------------------------------------------------------------- shared memory

// Bytes of shared memory that a block may have on every device from compute capability 8.0 on (8.6 has the least).
constexpr int kMaxSharedMemory = 101376;

// ROWS x COLUMNS numbers; each row is padded by 16 bytes, so that 8 rows lie in different banks.
template <typename T, int ROWS, int COLUMNS>
struct Tile {
    static_assert(ROWS % 16 == 0 && COLUMNS % 16 == 0, "products go in steps of 16");
    static constexpr int kColumns = COLUMNS;
    static constexpr int kStride = COLUMNS + 16 / static_cast<int>(sizeof(T));
    static constexpr int kBytes = ROWS * kStride * static_cast<int>(sizeof(T));

    T* data;

    __device__ T* at(int row, int column) const { return data + row * kStride + column; }
    // The number so many rows and columns behind it. A lane's distance is the same in every tile and is computed once.
    __device__ T* at(int row, int column, int lane_row, int lane_column) const {
        return at(row, column) + (lane_row * kStride + lane_column);
    }
};

// The stages of a pipeline: tiles of one kind, filled and used in rotation.
template <typename Tile, int COUNT>
struct Stages {
    static constexpr int kBytes = COUNT * Tile::kBytes;

    Tile first;

    __device__ Tile operator[](int i) const {
        return {first.data + i * (Tile::kBytes / static_cast<int>(sizeof(*first.data)))};
    }
};

// Allocates the block's shared memory from front to back; all threads make the same calls in the same order.
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

constexpr int kMaxWarps = 4;  // warps of a block at most

// Threads that work together, in whole warps: the rank of this one, and how many they are.
struct ThreadGroup {
    int rank, size;

    // The same, read anew from the hardware: what follows from it need not stay in registers.
    __device__ ThreadGroup reread() const { return {size == kWarp ? thread_index() % kWarp : thread_index(), size}; }
};
__device__ inline ThreadGroup block_threads() {
    return {static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)};
}
__device__ inline ThreadGroup warp_threads() {
    return {lane_index(), kWarp};
}

// ---------------------------------------------------------------- products

// Rows of the left operand of a 16 x 16 x 16 product. Its columns are places of the sum.
template <typename T>
struct LeftOperand {
    uint32_t parts[4];
};
template <>
struct LeftOperand<float> {
    float rows[2][16];
};
// [half of the places][row and row + 8 of the first place, then of the second]
template <>
struct LeftOperand<Tf32> {
    uint32_t parts[2][4];
};

// Columns of the right operand.
template <typename T>
struct RightOperand {
    uint32_t parts[4];
};
template <>
struct RightOperand<float> {
    const float* first;  // the first number of this lane
    int stride;
    bool by_rows;
};
// [half of the places][half of the columns][place]
template <>
struct RightOperand<Tf32> {
    uint32_t parts[2][2][2];
};

// Fills a Tf32 operand with `number(row, place)`, or `number(place, column)`, for each number of this lane.
template <typename Number>
__device__ inline void fill(LeftOperand<Tf32>& to, Number&& number) {
    const int row = lane_index() / 4, place = lane_index() % 4 * 2;
#pragma unroll
    for (int i = 0; i < 8; ++i)
        to.parts[i / 4][i % 4] = to_tf32(number(row + i % 2 * 8, place + i / 4 * 8 + i / 2 % 2));
}
template <typename Number>
__device__ inline void fill(RightOperand<Tf32>& to, Number&& number) {
    const int column = lane_index() / 4, place = lane_index() % 4 * 2;
#pragma unroll
    for (int i = 0; i < 8; ++i)
        to.parts[i / 4][i / 2 % 2][i % 2] = to_tf32(number(place + i / 4 * 8 + i % 2, column + i / 2 % 2 * 8));
}

// Loads rows [row, row + 16) of the left operand, and 16 places of the sum from `k` on, from a tile of such rows.
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
        ldmatrix_x4(to.parts, tile.at(row, k, lane % 16, lane / 16 * 8));
    }
}

// The same from a tile whose rows are places of the sum: the operand is the tile's transpose.
template <typename T, int ROWS, int COLUMNS>
__device__ inline void load_left_transposed(LeftOperand<T>& to, Tile<T, ROWS, COLUMNS> tile, int row, int k) {
    const int lane = lane_index();
    if constexpr (std::is_same_v<T, Tf32>) {
        fill(to, [&](int i, int place) { return widen(*tile.at(k + place, row + i)); });
    } else if constexpr (std::is_same_v<T, float>) {
#pragma unroll
        for (int i = 0; i < 32; ++i) to.rows[i / 16][i % 16] = *tile.at(k + i % 16, row + lane / 4 + i / 16 * 8);
    } else {
        ldmatrix_x4_trans(to.parts, tile.at(k, row, lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8));
    }
}

// Makes a left operand of an accumulator tile, whose columns become places of the next sum.
template <typename T>
__device__ inline void as_left_operand(LeftOperand<T>& to, const AccTile& acc) {
    if constexpr (std::is_same_v<T, Tf32>) {
#pragma unroll
        for (int i = 0; i < 8; ++i) to.parts[i / 4][i % 4] = to_tf32(acc.values[i / 4][i % 2 * 2 + i / 2 % 2]);
    } else if constexpr (std::is_same_v<T, float>) {
        const int quad = lane_index() / 4 * 4;
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    to.rows[i / 2][half * 8 + j * 2 + i % 2] = __shfl_sync(kAllLanes, acc.values[half][i], quad + j);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            to.parts[i] = pack<T>(acc.values[i / 2][i % 2 * 2], acc.values[i / 2][i % 2 * 2 + 1]);
    }
}

// Loads columns [column, column + 16) of the right operand, and 16 places of the sum from `k` on, from a tile whose
// rows are places of the sum.
template <typename T, int ROWS, int COLUMNS>
__device__ inline void load_right(RightOperand<T>& to, Tile<T, ROWS, COLUMNS> tile, int k, int column) {
    const int lane = lane_index();
    if constexpr (std::is_same_v<T, Tf32>)
        fill(to, [&](int place, int j) { return widen(*tile.at(k + place, column + j)); });
    else if constexpr (std::is_same_v<T, float>)
        to = {tile.at(k, column + lane % 4 * 2), tile.kStride, true};
    else
        ldmatrix_x4_trans(to.parts, tile.at(k, column, lane % 16, lane / 16 * 8));
}

// The same from a tile whose rows are the operand's columns: the operand is the tile's transpose.
template <typename T, int ROWS, int COLUMNS>
__device__ inline void load_right_transposed(RightOperand<T>& to, Tile<T, ROWS, COLUMNS> tile, int k, int column) {
    const int lane = lane_index();
    if constexpr (std::is_same_v<T, Tf32>)
        fill(to, [&](int place, int j) { return widen(*tile.at(column + j, k + place)); });
    else if constexpr (std::is_same_v<T, float>)
        to = {tile.at(column + lane % 4 * 2, k), tile.kStride, false};
    else
        ldmatrix_x4(to.parts, tile.at(column, k, lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8));
}

// Loads four places of the sum, from `k` on, of the column pairs of this lane: [place][column].
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

// acc += left * right.
template <typename T>
__device__ inline void mma(AccTile& acc, const LeftOperand<T>& left, const RightOperand<T>& right) {
    if constexpr (std::is_same_v<T, Tf32>) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            mma_m16n8k8_tf32(acc.values[i % 2], left.parts[i / 2], right.parts[i / 2][i % 2][0],
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
                    float& x = acc.values[half][row * 2 + column];
                    x = fmaf(left.rows[row][k + place], places[place][half * 2 + column], x);
                }
        }
    } else {
        mma_m16n8k16<T>(acc.values[0], left.parts, right.parts[0], right.parts[1]);
        mma_m16n8k16<T>(acc.values[1], left.parts, right.parts[2], right.parts[3]);
    }
}

}  // namespace cuda
}  // namespace interformer
