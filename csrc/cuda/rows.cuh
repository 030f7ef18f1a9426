// How a block finds its row from the offsets, on the device: the twin of `_triton/_rows.py`.
//
// Rows are cut into tiles of `block` units, a token being `units` of them (its heads, say). Row `b` owns the slots from
// `start_b * units / block + b` on: at least as many as it has tiles, and at most one more, which stays idle. So the
// number of slots follows from sizes alone, and a slot's row is found by a binary search over the offsets themselves.
// The tokens behind the last row, the tail, are row `rows`.
//
// The search never leaves the span that it has narrowed down so far: an entry counts for no less than the last one that
// led up, and for no more than the last one that led down. Which those are does not depend on what is looked for; so
// rows are a partition of all tokens, the same one for every search, whatever the offsets hold.
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
    __device__ int64_t edge(int64_t i) const { return clamped(entries[i], 0, tokens); }

    // A row as its two entries have it; the tail reaches to the end. Of disordered offsets, not one of the partition.
    __device__ Span span(int64_t row) const {
        const int64_t first = edge(row), last = row < rows ? edge(row + 1) : tokens;
        return {row, first, static_cast<int>(last > first ? last - first : 0)};
    }

    // Of a slot of tiles of `block` units, each token being `units` of them.
    __device__ Slot find(int64_t slot, int64_t units, int64_t block) const {
        // edge * units / block + row <= slot, without a division of 64 bits in every step
        const Span found = last_row([&](int64_t edge, int64_t row) { return edge * units < (slot - row + 1) * block; });
        return {found, (slot - (found.first * units / block + found.row)) * block};
    }

    // The row that holds a token.
    __device__ Span holder(int64_t token) const {
        return last_row([&](int64_t edge, int64_t) { return edge <= token; });
    }

    // The same among the rows [low, high] alone, `low` if none of them does; of disordered offsets, any of them.
    __device__ int64_t holder_of(int64_t token, int64_t low, int64_t high) const {
        while (low < high) {
            const int64_t middle = (low + high + 1) / 2;
            if (edge(middle) <= token)
                low = middle;
            else
                high = middle - 1;
        }
        return low;
    }

  private:
    __device__ static int64_t clamped(int64_t entry, int64_t low, int64_t high) {
        return entry < low ? low : entry > high ? high : entry;
    }

    // The last row of which `begun(first token, row)` holds; it does of row 0.
    template <typename Begun>
    __device__ Span last_row(Begun&& begun) const {
        int64_t low = 0, high = rows, first = 0, last = tokens;
        while (low < high) {
            const int64_t middle = (low + high + 1) / 2, edge = clamped(entries[middle], first, last);
            if (begun(edge, middle)) {
                low = middle;
                first = edge;
            } else {
                high = middle - 1;
                last = edge;
            }
        }
        return {low, first, static_cast<int>(last - first)};
    }
};

// ---------------------------------------------------------------- rows in chunks

// Long rows are cut into chunks of `split` tokens, the slots of tiles of that many; what each sums up lies one after
// another in memory, and a kernel after that joins them in order. This is the place of a chunk of a row in that memory:
// rows of more than `split` tokens have room side by side.
__device__ inline int64_t piece_of(int64_t first, int64_t chunk, int split) {
    return 2 * first / split + chunk;
}

// The row that is joined at a token, a multiple of `split`: the one that holds it, if it has more than `split` tokens
// behind the skipped ones and holds no such token before; every row that is cut holds one. Else a row of no tokens.
__device__ inline Span joined_at(const Offsets& offsets, int64_t token, int split, int skip) {
    if (token >= offsets.tokens) return {offsets.rows, offsets.tokens, 0};
    Span row = offsets.holder(token);
    if (row.row >= offsets.rows || row.count - skip <= split || token - split >= row.first) row.count = 0;
    return row;
}

}  // namespace cuda
}  // namespace interformer
