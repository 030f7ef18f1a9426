// How a block finds its row from the offsets, on the device: the twin of `_triton/_rows.py`.
//
// Rows are cut into tiles of `block` units, a token being `units` of them (its heads, say). Row `b` owns the slots from
// `start_b * units / block + b` on: at least as many as it has tiles, and at most one more, which stays idle. So the
// number of slots follows from sizes alone, and a slot's row is found by a binary search over the offsets themselves.
// The tokens behind the last row, the tail, are row `rows`.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/tensor_view.h"

namespace interformer {
namespace cuda {

// Number of slots of `rows` rows and the tail, for any offsets.
inline int64_t slots(int64_t tokens, int64_t rows, int64_t units, int64_t block) {
    return tokens * units / block + rows + 1;
}

// Tokens [first, first + count) of a row. The tail is row `rows`.
struct Span {
    int64_t row, first;
    int count;
};

// Of a slot: its row, and the unit of the row at which its tile begins (`count * units` or beyond: the slot is idle).
struct Slot {
    Span span;
    int64_t begin;
};

// An int32 or int64 vector.
struct Indices {
    const void* entries = nullptr;
    int64_t stride = 0;
    bool wide = false;

    Indices() = default;
    explicit Indices(const TensorView& view)
        : entries(view.data), stride(view.strides[0]), wide(view.dtype == DType::int64) {}

    __device__ int64_t operator[](int64_t i) const {
        return wide ? static_cast<const int64_t*>(entries)[i * stride]
                    : static_cast<const int32_t*>(entries)[i * stride];
    }
};

struct Offsets {
    Indices entries;
    int64_t rows, tokens;

    Offsets(const TensorView& view, int64_t tokens) : entries(view), rows(view.shape[0] - 1), tokens(tokens) {}

    // An entry, within the tensor whatever it holds.
    __device__ int64_t edge(int64_t i) const {
        const int64_t entry = entries[i];
        return entry < 0 ? 0 : entry > tokens ? tokens : entry;
    }

    // Of a row; the tail reaches to the end.
    __device__ Span span(int64_t row) const {
        const int64_t first = edge(row), last = row < rows ? edge(row + 1) : tokens;
        return {row, first, static_cast<int>(last > first ? last - first : 0)};
    }

    // Of a slot of tiles of `block` units, each token being `units` of them.
    __device__ Slot find(int64_t slot, int64_t units, int64_t block) const {
        // edge * units / block + row <= slot, without a division of 64 bits in every step
        const int64_t row = last_row(0, rows, [&](int64_t i) { return edge(i) * units < (slot - i + 1) * block; });
        Span found = span(row);
        const int64_t tile = slot - (found.first * units / block + row);
        // Before the first slot of a first row that starts late, against the contract, there is no row.
        if (tile < 0) found.count = 0;
        return {found, tile < 0 ? 0 : tile * block};
    }

    // The row of [low, high] that holds a token; `low` if none does.
    __device__ int64_t holder(int64_t token, int64_t low, int64_t high) const {
        return last_row(low, high, [&](int64_t i) { return edge(i) <= token; });
    }

  private:
    // The last of the rows [low, high] of which `begun` holds; `low` if none.
    template <typename Begun>
    __device__ int64_t last_row(int64_t low, int64_t high, Begun&& begun) const {
        while (low < high) {
            const int64_t middle = (low + high + 1) / 2;
            if (begun(middle))
                low = middle;
            else
                high = middle - 1;
        }
        return low;
    }
};

}  // namespace cuda
}  // namespace interformer
