// How a block finds its row from the offsets, on the device: the twin of `_triton/_rows.py`.
//
// Rows are cut into tiles of `block` packed rows, `per_token` of them to a token (its heads, say). Row `b` has the
// slots from `start_b * per_token / block + b` on: at least as many as it has tiles, and at most one more, which stays
// idle. So the number of slots follows from sizes alone, and a binary search over the offsets finds a slot's row. The
// tokens behind the last row, the tail, are row `rows`.
//
// The search never leaves the span that it has narrowed down so far: an entry is clamped between the last entry that
// led up and the last one that led down. These bounds do not depend on the value searched for, so rows are a partition
// of all tokens, the same one for every search, whatever the offsets hold.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/tensor_view.h"

namespace interformer {
namespace cuda {

// Number of slots of `rows` rows and the tail, for any offsets.
inline int64_t slots(int64_t tokens, int64_t rows, int64_t per_token, int64_t block) {
    return tokens * per_token / block + rows + 1;
}

// Tokens [first, first + count) of a row. The tail is row `rows`.
struct Span {
    int64_t row, first;
    int count;
};

// A slot's row, and the packed row at which its tile begins (`count * per_token` or beyond: the slot is idle).
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

    // An entry, clamped to the tensor.
    __device__ int64_t edge(int64_t i) const { return clamped(entries[i], 0, tokens); }

    // A row by its two entries; the tail reaches to the end. Where offsets are not sorted, it may differ from the
    // partition's.
    __device__ Span span(int64_t row) const {
        const int64_t first = edge(row), last = row < rows ? edge(row + 1) : tokens;
        return {row, first, static_cast<int>(last > first ? last - first : 0)};
    }

    // A row of the partition that searches find, or its tail.
    __device__ Span row(int64_t row) const {
        return last_row([&](int64_t, int64_t begun) { return begun <= row; });
    }

    // Row and tile of a slot, where tiles are `block` packed rows, `per_token` of them to a token.
    __device__ Slot find(int64_t slot, int64_t per_token, int64_t block) const {
        // edge * per_token / block + row <= slot, without a 64-bit division in every step
        const Span span =
            last_row([&](int64_t edge, int64_t row) { return edge * per_token < (slot - row + 1) * block; });
        return {span, (slot - (span.first * per_token / block + span.row)) * block};
    }

    // The row of a token.
    __device__ Span row_at(int64_t token) const {
        return last_row([&](int64_t edge, int64_t) { return edge <= token; });
    }

    // The row of a token among the rows [low, high], or `low` if it is in none of them. Where offsets are not sorted,
    // it may be any of these rows.
    __device__ int64_t row_between(int64_t token, int64_t low, int64_t high) const {
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

    // The last row for which `begun(first token, row)` is true; for row 0 it must be.
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

// ---------------------------------------------------------------- split rows

// A long row is split every `size` tokens, in slots of tiles of that many tokens. Each split writes its sums to memory,
// its partial, and a later kernel combines the partials of a row in order. This is the index of a split's partial for a
// row that begins at token `first`: rows of more than `size` tokens do not overlap there.
__device__ inline int64_t partial_index(int64_t first, int64_t split, int size) {
    return 2 * first / size + split;
}

// The split row that is combined at `token`, a multiple of `size`: the row of the token, if it has more than `size`
// tokens behind the skipped ones and no earlier multiple of `size`. Every split row has such a token. Else the result
// has no tokens.
__device__ inline Span split_row_at(const Offsets& offsets, int64_t token, int size, int skip) {
    if (token >= offsets.tokens) return {offsets.rows, offsets.tokens, 0};
    Span row = offsets.row_at(token);
    if (row.row >= offsets.rows || row.count - skip <= size || token - size >= row.first) row.count = 0;
    return row;
}

}  // namespace cuda
}  // namespace interformer
