// Asynchronous copies of tiles from global to shared memory.
//
// Each warp of the threads has a strip of the tile's rows. A lane copies vectors of 16 bytes in one column, at rows
// that are equally far apart: it computes one address for a tile, and advances it by the same distance for every
// vector. That makes three instructions for a vector, one more in a tile at an edge, and four more where several heads
// of a token are rows. Three more precede each group of copies without a branch in between: another reason to copy
// tiles of the same rows of two sources together.
#pragma once

#include <climits>
#include <cstdint>

#include "cuda/tiles.cuh"

namespace interformer {
namespace cuda {

// Rows of `columns` numbers in memory. Each token has `per_token` of them, its heads, which are numbered token by
// token.
template <typename T>
struct RowSource {
    const T* data;
    int64_t token;  // stride of tokens
    int columns;
    int alignment;  // the result of `copy_alignment`
    int64_t head = 0;
    int per_token = 1;
};

// Copies the first `bytes` of 16 bytes, with zeros behind them, from memory aligned to `alignment` < 16 bytes.
template <typename T>
__device__ inline void cp_async_unaligned(T* to, const T* from, int bytes, int alignment) {
    char* target = reinterpret_cast<char*>(to);
    const char* source = reinterpret_cast<const char*>(from);
    if (alignment == 8) {
        cp_async<8>(target, source, min(bytes, 8));
        cp_async<8>(target + 8, bytes > 8 ? source + 8 : source, max(bytes - 8, 0));
    } else if (alignment == 4) {
        for (int i = 0; i < 16; i += 4)
            cp_async<4>(target + i, bytes > i ? source + i : source, min(max(bytes - i, 0), 4));
    } else {
        const int count = bytes / static_cast<int>(sizeof(T));
        for (int i = 0; i < 16 / static_cast<int>(sizeof(T)); ++i) to[i] = i < count ? from[i] : T{};
    }
}

// One thread's part in copies of tiles of one kind from one source.
template <typename Tile>
class TileCopy;

template <typename T, int ROWS, int COLUMNS>
class TileCopy<Tile<T, ROWS, COLUMNS>> {
    static constexpr int kVector = 16 / static_cast<int>(sizeof(T)), kVectors = COLUMNS / kVector;
    static constexpr int kAcross = kVectors < kWarp ? kVectors : kWarp;  // lanes that share a row
    static constexpr int kStep = kWarp / kAcross;                        // rows of a warp at one time
    // Vectors of a lane in one column where all warps of a block share a tile; fewer warps have a multiple of it.
    static constexpr int kUnrolled = ROWS / kStep > kMaxWarps ? ROWS / kStep / kMaxWarps : 1;

  public:
    // Rows of a warp's strip; of 1, 2 or 4 warps: no division.
    __device__ static int strip_rows(ThreadGroup threads) { return max(ROWS >> threads.size / (2 * kWarp), kStep); }

    __device__ TileCopy(const RowSource<T>& source, ThreadGroup threads)
        : source_(source),
          rows_(strip_rows(threads)),
          row_(threads.rank / kWarp * rows_ + row_of(threads.rank % kWarp / kAcross)),
          column_(threads.rank % kAcross * kVector),
          step_(static_cast<uint32_t>(source.token) * static_cast<uint32_t>(kStep * sizeof(T))),
          tile_(static_cast<uint32_t>(source.token) * static_cast<uint32_t>(ROWS * sizeof(T))) {
        source_.data += column_;
        constexpr int kBytes = static_cast<int>(sizeof(T));
        advance_.rows = kStep * kBytes * source.token;
        if (source.per_token == 1) {
            source_.data += row_ * source.token;
            return;
        }
        const int tokens = kStep / source.per_token;
        advance_.heads = kStep % source.per_token;
        advance_.rows = kBytes * (tokens * source.token + advance_.heads * source.head);
        advance_.carry = kBytes * (source.token - source.per_token * source.head);
    }

    // Starts the copy of the source's rows [first, first + count) into a tile, with zeros in its other rows and behind
    // the columns. `cp_async_commit`, `cp_async_wait` and a barrier complete it.
    __device__ void start(Tile<T, ROWS, COLUMNS> to, int64_t first, int count) const {
        if (row_ >= ROWS) return;
        if (source_.alignment < 16) return copy_unaligned(to, first, count);
#pragma unroll 1
        for (int column = 0; column < COLUMNS; column += kAcross * kVector) {
            if (source_.per_token > 1)
                copy_column<true, true>(to, first, count, column);
            else if (count >= ROWS)
                copy_column<false, false>(to, first, count, column);
            else
                copy_column<false, true>(to, first, count, column);
        }
    }

    // Starts copies of tile `tile` of two sources into tiles one behind the other, of which `count` rows are there.
    // Without an EDGE, these are `inner_rows` or more.
    template <bool EDGE>
    __device__ static void start_pair(Tile<T, ROWS, COLUMNS> to, int tile, int count, const TileCopy& left,
                                      const TileCopy& right) {
        static_assert(kStep * kMaxWarps <= ROWS, "each warp has a strip");
#pragma unroll 1
        for (int column = 0; column < COLUMNS; column += kAcross * kVector) {
            PairColumn<EDGE> pair{to.at(left.row_, left.column_ + column), {}, {}, {}, count - left.row_};
            pair.add(0, left, tile, column);
            pair.add(1, right, tile, column);
            if constexpr (kUnrolled > 1) {
#pragma unroll 1
                for (int row = kUnrolled * kStep;; row += kUnrolled * kStep) {
                    pair.template copy<0, kUnrolled>();
                    if (row >= left.rows_) break;  // at once where all warps of a block share the tile
                    pair.template advance<kUnrolled>();
                }
            } else {  // one, two or four vectors
                pair.template copy<0, 1>();
                if (left.rows_ == kStep) continue;
                pair.template copy<1, 2>();
                if (left.rows_ > 2 * kStep) pair.template copy<2, 4>();
            }
        }
    }
    // Whether `start_pair` serves two sources: aligned ones whose rows are tokens.
    __device__ static bool are_pair(const RowSource<T>& left, const RowSource<T>& right) {
        return (min(left.alignment, right.alignment) >= 16) & (left.per_token == 1) & (right.per_token == 1);
    }
    // Rows of a pair of tiles without an edge; columns that are missing are one, too.
    __device__ static int inner_rows(const RowSource<T>& left, const RowSource<T>& right) {
        return min(left.columns, right.columns) >= COLUMNS ? ROWS : INT_MAX;
    }

    // Keeps what `start_pair` reads in registers, where it would be made anew for every tile.
    __device__ void keep() {
        source_.data = opaque(source_.data);
        step_ = opaque(step_);
        tile_ = opaque(tile_);
    }

  private:
    // A row of the source: its first number, and its head.
    struct Place {
        const char* data;
        int head;
    };
    // The distance between two rows of a lane, in bytes: `carry` comes on top where the head is beyond the token's last
    // one.
    struct Advance {
        int64_t rows = 0, carry = 0;
        int heads = 0;
    };

    // A lane's vectors in one column of two tiles.
    template <bool EDGE>
    struct PairColumn {
        T* target;
        const char* source[2];
        uint32_t step[2];  // bytes from vector to vector
        bool in_columns[2];
        int left;  // rows of the sources from the lane's first one on

        __device__ void add(int n, const TileCopy& from, int tile, int column) {
            source[n] = reinterpret_cast<const char*>(from.source_.data + column) +
                        uint64_t{static_cast<uint32_t>(tile)} * from.tile_;
            step[n] = from.step_;
            in_columns[n] = from.column_ + column < from.source_.columns;
        }
        // Copies vectors [BEGIN, END). The sources are at the vector before, or at the first one.
        template <int BEGIN, int END>
        __device__ void copy() {
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int i = BEGIN; i < END; ++i) {
                    if (i > 0) source[n] += step[n];
                    cp_async_or_zero(target + (n * ROWS + i * kStep) * Tile<T, ROWS, COLUMNS>::kStride, source[n],
                                     !EDGE || (in_columns[n] & (left > i * kStep)));
                }
        }
        // Goes on to the vector behind the first `COUNT` ones.
        template <int COUNT>
        __device__ void advance() {
#pragma unroll
            for (int n = 0; n < 2; ++n) source[n] += step[n];
            target += COUNT * kStep * Tile<T, ROWS, COLUMNS>::kStride;
            left -= COUNT * kStep;
        }
    };

    // The first row of a lane in a strip. Eight neighbours store 128 bytes at a time: where they are of several rows,
    // adjacent rows would share banks, and these do not.
    __device__ static int row_of(int i) {
        constexpr int kRows = kAcross < 8 ? 8 / kAcross : 1;
        return i / 8 * 8 + i % kRows * (8 / kRows) + i % 8 / kRows;
    }

    __device__ Place at(int64_t distance, int head) const {
        return {reinterpret_cast<const char*>(source_.data) + distance * static_cast<int>(sizeof(T)), head};
    }
    // The place of this thread's first row and column in a tile that begins at row `first`.
    __device__ Place place(int64_t first) const {
        // A row of the batch has fewer than 2^31 tokens: half the instructions of a 64-bit product.
        if (source_.per_token == 1) return at(static_cast<uint32_t>(first) * source_.token, 0);
        const int64_t row = first + row_, token = row / source_.per_token;
        const int head = static_cast<int>(row - token * source_.per_token);
        return at(token * source_.token + head * source_.head, head);
    }
    template <bool PACKED>
    __device__ void advance(Place& place) const {
        place.data += advance_.rows;
        if constexpr (PACKED) {
            place.head += advance_.heads;
            if (place.head >= source_.per_token) {
                place.head -= source_.per_token;
                place.data += advance_.carry;
            }
        }
    }

    template <bool PACKED, bool EDGE>
    __device__ void copy_column(Tile<T, ROWS, COLUMNS> to, int64_t first, int count, int column) const {
        Place from = place(first);
        from.data += column * static_cast<int>(sizeof(T));
        T* target = to.at(row_, column_ + column);
        const bool in_columns = column_ + column < source_.columns;
        const int left = count - row_;  // rows behind this one, and itself
#pragma unroll 1
        for (int row = 0;; row += kUnrolled * kStep) {
#pragma unroll
            for (int i = 0; i < kUnrolled; ++i) {
                if (i > 0) advance<PACKED>(from);
                cp_async_or_zero(target + i * kStep * to.kStride, from.data,
                                 in_columns & (!EDGE | (left > row + i * kStep)));
            }
            if (row + kUnrolled * kStep >= rows_) break;  // at once where all warps of a block share the tile
            advance<PACKED>(from);
            target += kUnrolled * kStep * to.kStride;
        }
    }

    __device__ void copy_unaligned(Tile<T, ROWS, COLUMNS> to, int64_t first, int count) const {
#pragma unroll 1
        for (int column = column_; column < COLUMNS; column += kAcross * kVector) {
            Place from = place(first);
            from.data += (column - column_) * static_cast<int>(sizeof(T));
#pragma unroll 1
            for (int row = row_; row < row_ + rows_; row += kStep) {
                const int numbers = row < count ? min(source_.columns - column, kVector) : 0;
                if (numbers > 0)
                    cp_async_unaligned(to.at(row, column), reinterpret_cast<const T*>(from.data),
                                       numbers * static_cast<int>(sizeof(T)), source_.alignment);
                else
                    *reinterpret_cast<uint4*>(to.at(row, column)) = uint4{0, 0, 0, 0};
                advance<true>(from);
            }
        }
    }

    RowSource<T> source_;  // from this thread's column on, and, where tokens are rows, from its row on
    int rows_;             // of the warp's strip
    int row_, column_;
    uint32_t step_, tile_;  // bytes between a lane's rows, and between tiles, where tokens are rows
    Advance advance_;
};

template <typename T, int ROWS, int COLUMNS>
__device__ inline void cp_async_tile(Tile<T, ROWS, COLUMNS> to, const RowSource<T>& source, ThreadGroup threads,
                                     int64_t first, int count) {
    TileCopy<Tile<T, ROWS, COLUMNS>>(source, threads).start(to, first, count);
}

}  // namespace cuda
}  // namespace interformer
