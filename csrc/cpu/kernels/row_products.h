// Products with matrices that each belong to one row of the batch: tiles that are rounded and written from registers,
// while the next row's memory is on its way.
#pragma once

#include "cpu/kernels/multiply.h"

INTERFORMER_ISA_BEGIN

// Memory that the next row needs, as ranges of bytes. The tiles of this row fetch it to the second level of cache, an
// equal share with each of their steps: at once, it would hold up the tiles' own reads.
class Prefetches {
  public:
    void add(const void* first, int64_t bytes) {
        ranges_[count_++] = {static_cast<const char*>(first), bytes};
        bytes_ += bytes;
    }
    // The steps that follow. Where they are few, every second line is left to the processor, which fetches pairs.
    void spread(int64_t steps) { step_ = min(kMostOfStep, bytes_ / max(steps, 1) + 1); }

    // The share of a tile of `steps` steps: an address, and the bytes from each step's address to the next one's.
    struct Share {
        const char* at;
        int64_t step;
    };
    Share share(int64_t steps) {
        if (next_ == count_) return {reinterpret_cast<const char*>(this), 0};
        Range& range = ranges_[next_];
        const Share share{range.first, step_};
        range.first += step_ * steps;
        range.bytes -= step_ * steps;
        if (range.bytes <= 0) ++next_;
        return share;
    }

  private:
    static constexpr int64_t kMostOfStep = 2 * 64;
    struct Range {
        const char* first;
        int64_t bytes;
    };
    Range ranges_[5];
    int64_t bytes_ = 0, step_ = 0;
    int count_ = 0, next_ = 0;
};

// A matrix whose columns are read by the panel: the rows of a panel are `stride` apart, panels are `panel` apart.
template <typename X>
struct Panels {
    const X* data;
    int64_t stride, panel = kPanel<X>;

    Panels(Matrix<const X> x) : data(x.data), stride(x.stride) {}
    Panels(const X* packed, int64_t depth) : data(packed), stride(kPanel<X>), panel(kPanel<X> * depth) {}
};

// c[m, n] = start[n] + sum over k of a[m, k] * b[k, n], rounded to T. `stream`: past the caches.
template <typename X, int M, int N, typename T>
void row_tile(Scalars<X> a, Matrix<const X> b, int64_t depth, const SumOf<X>* start, Matrix<T> c,
              Prefetches::Share ahead, bool stream) {
    constexpr int64_t W = kLanes<X>;
    Vector<SumOf<X>> sum[M][N];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sum[m][n] = load_vector(start + n * W);
    for (int64_t k = 0; k < depth; ++k) {
        Vector<X> row[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) row[n] = load_vector(b.data + n * W);
        b.data += b.stride;
        __builtin_prefetch(ahead.at, 0, 2);
        ahead.at += ahead.step;
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const X x = a.data[m * a.row];
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) multiply_add<X>(sum[m][n], x, row[n]);
        }
        a.data += a.column;
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            T* to = c.data + m * c.stride + n * W;
            if (stream)
                stream_wide(to, sum[m][n]);
            else
                store_wide(to, sum[m][n]);
        }
}

// `row_tile` for `rows` of [1, M].
template <typename X, int M, int N, typename T>
inline void row_tiles(int64_t rows, Scalars<X> a, Matrix<const X> b, int64_t depth, const SumOf<X>* start, Matrix<T> c,
                      Prefetches::Share ahead, bool stream) {
    if (rows == M) return row_tile<X, M, N>(a, b, depth, start, c, ahead, stream);
    if constexpr (M > 1) row_tiles<X, M - 1, N>(rows, a, b, depth, start, c, ahead, stream);
}

// The same for at most `kTileRows` rows and any number of columns that is a multiple of the vector.
template <typename X, typename T>
void row_products(int64_t rows, Scalars<X> a, Panels<X> b, int64_t columns, int64_t depth, const SumOf<X>* start,
                  Matrix<T> c, Prefetches& ahead, bool stream = false) {
    int64_t n = 0;
    if (rows <= 3 && b.panel == kPanel<X>)  // more columns at once, to hide the latency of the sums
        for (; n + 2 * kPanel<X> <= columns; n += 2 * kPanel<X>)
            row_tiles<X, 3, 4, T>(rows, a, {b.data + n, b.stride}, depth, start + n, {c.data + n, c.stride},
                                  ahead.share(depth), stream);
    for (; n < columns; n += kPanel<X>) {
        const Matrix<const X> panel{b.data + n / kPanel<X> * b.panel, b.stride};
        const Matrix<T> to{c.data + n, c.stride};
        if (columns - n > kLanes<X>)
            row_tiles<X, kTileRows, 2, T>(rows, a, panel, depth, start + n, to, ahead.share(depth), stream);
        else
            row_tiles<X, kTileRows, 1, T>(rows, a, panel, depth, start + n, to, ahead.share(depth), stream);
    }
}

// The steps of `row_products` for any number of rows.
template <typename X>
inline int64_t steps_of(int64_t rows, int64_t columns, int64_t depth) {
    return (rows + kTileRows - 1) / kTileRows * ((columns + kPanel<X> - 1) / kPanel<X>)*depth;
}

// Calls `each(first, count)` for tiles of at most `kTileRows` of `rows` rows, of nearly equal height.
template <typename Each>
INTERFORMER_INLINE void for_each_tile(int64_t rows, Each&& each) {
    int64_t first = 0;
    for (int64_t tiles = (rows + kTileRows - 1) / kTileRows; tiles > 0; --tiles) {
        const int64_t count = (rows - first + tiles - 1) / tiles;
        each(first, count);
        first += count;
    }
}

INTERFORMER_ISA_END
