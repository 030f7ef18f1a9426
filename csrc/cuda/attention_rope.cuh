// Rotary embedding inside the attention kernels: queries and keys are rotated in shared memory once their copies have
// landed, and rounded to their type; gradients are rotated back as they are staged for the output.
//
// A warp rotates rows that its own lanes have copied, or staged, so no barrier of the block is added.
#pragma once

#include <cstdint>

#include "cuda/acc_tile.cuh"
#include "cuda/attention.h"
#include "cuda/attention_masks.cuh"
#include "cuda/elements.h"
#include "cuda/rotary.cuh"
#include "cuda/rows.cuh"
#include "cuda/vectors.cuh"

namespace interformer {
namespace cuda {

// The call's tables and positions. Rows of both tables are equally far apart, and are read four numbers at a time.
struct Rope {
    const float *cos = nullptr, *sin = nullptr;
    uint32_t table_row = 0;  // stride of the tables' rows
    int last_row = 0;
    int half = 0;  // pairs of channels that rotate; 0: there is no rotary embedding
    bool interleaved = false;
    RotatedInside inside;
    Indices positions_q, positions_k;  // without entries: a token's position is its index in the row

    Rope(const AttentionInputs& in, const RotatedInside& rotated) {
        if (!in.cos) return;
        cos = static_cast<const float*>(in.cos->data);
        sin = static_cast<const float*>(in.sin->data);
        table_row = static_cast<uint32_t>(in.cos->strides[0]);
        last_row = clamped(in.cos->shape[0] - 1);
        half = static_cast<int>(in.cos->shape[1]);
        interleaved = in.rope_interleaved;
        inside = rotated;
        if (in.positions_q) positions_q = Indices(*in.positions_q);
        if (in.positions_k) positions_k = Indices(*in.positions_k);
    }

    // The place in the tables of token `n` of a row whose first one is token `first` of the batch.
    __device__ uint64_t place(const Indices& positions, int64_t first, int n) const {
        int row = min(n, last_row);
        if (positions.entries != nullptr)
            row = static_cast<int>(min(max(positions[first + n], int64_t{0}), int64_t{last_row}));
        return uint64_t{static_cast<uint32_t>(row)} * table_row;
    }
};

// Rows [begin, end) of a tile in shared memory, each a token of one row of the batch (under some head).
struct RotaryRows {
    const Rope& rope;
    const Indices& positions;
    int64_t first;      // token of the batch that is the row's first
    PackedRows tokens;  // of the tile's rows
    int begin, end;

    // Rotates the rows, `stride` numbers apart, by the lanes of a warp. `sign` is 1, or -1 to rotate back. Four pairs
    // at a time: (c, c + half), or (2 c, 2 c + 1) if interleaved, from pair `c` on.
    template <int WIDTH, typename T>
    __device__ void rotate(T* tile, int stride, float sign) const {
        constexpr int kAcross = WIDTH / 8, kRows = kWarp / kAcross;  // lanes that share a row; rows of a warp
        // Read anew, so that what follows from the lane stays in no register from tile to tile.
        const int lane = thread_index() % kWarp, c = lane % kAcross * 4;
        if (c >= rope.half) return;
        T* channels = tile + (rope.interleaved ? 2 * c : c);
        const int beside = rope.interleaved ? 4 : rope.half;
#pragma unroll 1
        for (int row = begin + lane / kAcross; row < end; row += kRows) {
            const uint64_t place = rope.place(positions, first, tokens[row].token) + c;
            const Four cos = load_four(rope.cos + place, 1, 4, true), sin = load_four(rope.sin + place, 1, 4, true);
            T* from = channels + row * stride;
            Four low = load_four<T>(from, 1, 4, true), high = load_four<T>(from + beside, 1, 4, true);
            const auto at = [&](int i) -> float& { return i < 4 ? low.values[i] : high.values[i - 4]; };
            const auto rotate_each = [&](int pair, int distance) {
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    rotate_pair(at(i * pair), at(i * pair + distance), cos.values[i], sign * sin.values[i]);
            };
            if (rope.interleaved)
                rotate_each(2, 1);
            else
                rotate_each(1, 4);
            store_four(from, low, 4, true);
            store_four(from + beside, high, 4, true);
        }
    }
};

}  // namespace cuda
}  // namespace interformer
