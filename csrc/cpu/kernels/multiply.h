// Matrix products of small operands, the inner loop that all kernels share:
//
//     C[m, n] (+)= sum over k of a[m, k] * B[k, n]
//
// The numbers of `a` are broadcast one by one, so it may be read along either axis; B and C are read by the vector.
// Sums run in the order of k whatever the sizes, so a result's bits depend on its own row and column alone.
#pragma once

#include "cpu/kernels/memory.h"
#include "cpu/kernels/operands.h"

INTERFORMER_ISA_BEGIN

template <typename X, int M, int N>
void multiply_tile(Scalars<X> a, const X* b, int64_t b_stride, int64_t depth, SumOf<X>* c, int64_t c_stride, bool add) {
    using A = SumOf<X>;
    constexpr int64_t W = kLanes<X>;
    Vector<A> sum[M][N];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sum[m][n] = Vector<A>{};
    for (int64_t k = 0; k < depth; ++k) {
        Vector<X> row[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) row[n] = load_vector(b + k * b_stride + n * W);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const X x = a.data[m * a.row + k * a.column];
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) multiply_add<X>(sum[m][n], x, row[n]);
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            A* to = c + m * c_stride + n * W;
            // The earlier sum is added last, so that the error of a long sum grows with its steps, not its terms.
            store_vector(to, add ? load_vector(to) + sum[m][n] : sum[m][n]);
        }
}

// `multiply_tile` for `rows` of [1, M].
template <typename X, int M, int N>
inline void multiply_rows(int64_t rows, Scalars<X> a, const X* b, int64_t b_stride, int64_t depth, SumOf<X>* c,
                          int64_t c_stride, bool add) {
    if (rows == M) return multiply_tile<X, M, N>(a, b, b_stride, depth, c, c_stride, add);
    if constexpr (M > 1) multiply_rows<X, M - 1, N>(rows, a, b, b_stride, depth, c, c_stride, add);
}

// C [rows, N vectors], in tiles of nearly equal height: a last tile of one row would be bound by the latency of its
// sums.
template <typename X, int N>
void multiply_columns(Scalars<X> a, const X* b, int64_t b_stride, int64_t rows, int64_t depth, Matrix<SumOf<X>> c,
                      bool add) {
    for (int64_t tiles = (rows + kTileRows - 1) / kTileRows; tiles > 0; --tiles) {
        const int64_t m = (rows + tiles - 1) / tiles;
        multiply_rows<X, kTileRows, N>(m, a, b, b_stride, depth, c.data, c.stride, add);
        a = a.from(m, 0);
        c.data += m * c.stride;
        rows -= m;
    }
}

// C [rows, columns] with B's rows read in place; `columns` is a multiple of the vector.
template <typename X>
void multiply(Scalars<X> a, Matrix<const X> b, int64_t rows, int64_t columns, int64_t depth, Matrix<SumOf<X>> c,
              bool add) {
    int64_t n = 0;
    if (rows <= 3)  // more columns at once, to hide the latency of the sums
        for (; n + 2 * kPanel<X> <= columns; n += 2 * kPanel<X>)
            multiply_rows<X, 3, 4>(rows, a, b.data + n, b.stride, depth, c.data + n, c.stride, add);
    for (; n + kPanel<X> <= columns; n += kPanel<X>)
        multiply_columns<X, 2>(a, b.data + n, b.stride, rows, depth, {c.data + n, c.stride}, add);
    if (n < columns) multiply_columns<X, 1>(a, b.data + n, b.stride, rows, depth, {c.data + n, c.stride}, add);
}

// Columns [first, last) of C with B packed in panels by `pack_transposed`. `first` is a multiple of the panel, `last`
// of the vector.
template <typename X>
void multiply_packed(Scalars<X> a, const X* panels, int64_t rows, int64_t first, int64_t last, int64_t depth,
                     Matrix<SumOf<X>> c, const RangeAhead& ahead) {
    constexpr int64_t kStepDepth = 64;  // a long sum is made in steps
    for (int64_t n = first; n < last; n += kPanel<X>) {
        ahead.fetch(n, n + kPanel<X>);
        int64_t k = 0;
        do {
            const X* panel = panels + n * depth + k * kPanel<X>;
            const int64_t step = min(kStepDepth, depth - k);
            if (last - n > kLanes<X>)
                multiply_columns<X, 2>(a.from(0, k), panel, kPanel<X>, rows, step, {c.data + n, c.stride}, k > 0);
            else
                multiply_columns<X, 1>(a.from(0, k), panel, kPanel<X>, rows, step, {c.data + n, c.stride}, k > 0);
        } while ((k += kStepDepth) < depth);
    }
}

// ---------------------------------------------------------------- transposing

// Exchanges every second set of S lanes of `above` with the S lanes before it of `below`.
template <typename A, int S>
INTERFORMER_INLINE void exchange(Vector<A>& above, Vector<A>& below) {
    constexpr int W = kLanes<A>;
    Vector<typename IndexOf<A>::type> low, high;
#pragma GCC unroll 16
    for (int lane = 0; lane < W; ++lane) {
        low[lane] = lane & S ? W + lane - S : lane;
        high[lane] = lane & S ? W + lane : lane + S;
    }
    const Vector<A> first = above, second = below;
    above = __builtin_shuffle(first, second, low);
    below = __builtin_shuffle(first, second, high);
}

// Transposes a square of `kLanes` rows of one vector each in registers: halves are exchanged, then quarters, ...
template <typename A, int S = kLanes<A> / 2>
inline void transpose_square(Vector<A>* rows) {
    if constexpr (S > 0) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes<A>; ++i)
            if (!(i & S)) exchange<A, S>(rows[i], rows[i + S]);
        transpose_square<A, S / 2>(rows);
    }
}

// Reduces the lanes of each of `kLanes` vectors, in the order of `reduce_lanes`. Lane i of the result is that of vector
// i.
template <typename A, int S = kLanes<A> / 2, typename Op>
INTERFORMER_INLINE Vector<A> reduce_vectors(Vector<A>* rows, Op op) {
    if constexpr (S == 0) {
        return rows[0];
    } else {
#pragma GCC unroll 16
        for (int i = 0; i < S; ++i) {
            exchange<A, S>(rows[i], rows[i + S]);
            rows[i] = op(rows[i], rows[i + S]);
        }
        return reduce_vectors<A, S / 2>(rows, op);
    }
}

// The same for the first `count` vectors; a few are reduced one by one. Further lanes of the result have no meaning.
template <typename A, typename Op>
INTERFORMER_INLINE Vector<A> reduce_first(Vector<A>* rows, int64_t count, Op op) {
    constexpr int64_t W = kLanes<A>, kOneByOne = W / 4;
    if (count <= kOneByOne) {
        A lanes[W] = {};
        for (int64_t i = 0; i < count; ++i) lanes[i] = reduce_lanes<A>(rows[i], op);
        return load_vector(lanes);
    }
    for (int64_t i = count; i < W; ++i) rows[i] = rows[0];
    return reduce_vectors<A>(rows, op);
}

// C[m, n] = sum over k of a[m, k] * b[n, k] for n in [0, columns), without packing: for few rows. `depth` is a multiple
// of the vector. C is written by whole vectors; numbers beyond the columns have no meaning.
template <typename X>
void multiply_dots(Matrix<const X> a, Matrix<const X> b, int64_t rows, int64_t columns, int64_t depth,
                   Matrix<SumOf<X>> c) {
    using A = SumOf<X>;
    constexpr int64_t W = kLanes<X>;
    for (int64_t n = 0; n < columns; n += W)
        for (int64_t m = 0; m < rows; ++m) {
            Vector<A> sums[W];
            const X* row[W];
#pragma GCC unroll 16
            for (int64_t i = 0; i < W; ++i) {
                sums[i] = Vector<A>{};
                row[i] = b.from(min(n + i, columns - 1)).data;
            }
            for (int64_t k = 0; k < depth; k += W) {
                const Vector<X> x = load_vector(a.from(m).data + k);
#pragma GCC unroll 16
                for (int64_t i = 0; i < W; ++i) multiply_add<X>(sums[i], x, load_vector(row[i] + k));
            }
            store_vector(c.from(m).data + n, reduce_vectors<A>(sums, Plus{}));
        }
}

// Transposes X [tokens, channels] into panels of columns: number (c, t) goes to
// `to[(t / kPanel) * channels * kPanel + c * kPanel + t % kPanel]`. The last vector is padded with tokens of 0.
template <typename A>
void pack_transposed(Matrix<const A> x, int64_t tokens, int64_t channels, A* to) {
    constexpr int64_t W = kLanes<A>;
    for (int64_t t = 0; t < tokens; t += W) {
        A* panel = to + t / kPanel<A> * kPanel<A> * channels + t % kPanel<A>;
        const A* from = x.data + t * x.stride;
        int64_t c = 0;
        for (; c + W <= channels; c += W) {
            Vector<A> square[W];
            if (t + W <= tokens) {
#pragma GCC unroll 16
                for (int64_t i = 0; i < W; ++i) square[i] = load_vector(from + i * x.stride + c);
            } else {
#pragma GCC unroll 16
                for (int64_t i = 0; i < W; ++i)
                    square[i] = t + i < tokens ? load_vector(from + i * x.stride + c) : Vector<A>{};
            }
            transpose_square<A>(square);
#pragma GCC unroll 16
            for (int64_t i = 0; i < W; ++i) store_vector(panel + (c + i) * kPanel<A>, square[i]);
        }
        for (; c < channels; ++c)
            for (int64_t i = 0; i < W; ++i) panel[c * kPanel<A> + i] = t + i < tokens ? from[i * x.stride + c] : A(0);
    }
}

// ---------------------------------------------------------------- ranges of columns of attention's scores

// A range of columns, which are keys of a row: `begin` is a multiple of the panel, `end` of the vector.
struct Columns {
    int64_t begin, end;
};

// At most three ranges of columns, in order: the prefix, the rest and targets, as far as they do not touch.
struct ColumnRanges {
    Columns r[3];
    int n;
};

// to[count, columns] = sum over the keys j of the ranges of probs[., j] * tokens[j]. Summing kStepKeys keys at a time
// keeps the rounding error of long sums small.
template <typename X>
void weighted_sums(Scalars<X> probs, Matrix<const X> tokens, const ColumnRanges& ranges, int64_t keys, int64_t count,
                   int64_t columns, Matrix<SumOf<X>> to) {
    constexpr int64_t kStepKeys = 128 * kNumbers<X>;
    bool add = false;
    for (int i = 0; i < ranges.n; ++i)
        for (int64_t j = ranges.r[i].begin; j < min(ranges.r[i].end, keys); j += kStepKeys) {
            const int64_t depth = operands<X>(min(kStepKeys, min(ranges.r[i].end, keys) - j)), k = j / kNumbers<X>;
            multiply<X>(probs.from(0, k), tokens.from(k), count, columns, depth, to, add);
            add = true;
        }
    if (!add)
        for (int64_t i = 0; i < count; ++i) fill(to.data + i * to.stride, columns, SumOf<X>(0));
}

// The keys or values of a row as one operand of products along the channels, packed in panels.
template <typename T>
class PackedOperand {
  public:
    using S = Stored<T>;
    using X = Operand<T>;

    // Packs those of the `count` tokens that lie in the ranges. `channels` includes the padding of a token; `panels` is
    // memory for the packed copy.
    PackedOperand(Matrix<const S> tokens, int64_t count, const ColumnRanges& ranges, int64_t channels, X* panels)
        : panels_(panels), depth_(channels / kNumbers<X>) {
        const Matrix<const X> operands = along_columns<X>(tokens);
        for (int i = 0; i < ranges.n; ++i) {
            const int64_t begin = ranges.r[i].begin, end = min(ranges.r[i].end, count);
            pack_transposed<X>(operands.from(begin), end - begin, depth_, panels + begin * depth_);
        }
    }

    // to[., j] = rows . token j, for the columns j of the ranges. With them the tokens `ahead` of these numbers are
    // fetched.
    void multiply(Matrix<const S> rows, int64_t count, const ColumnRanges& ranges, Matrix<Acc<T>> to,
                  const RangeAhead& ahead) const {
        for (int i = 0; i < ranges.n; ++i)
            multiply_packed<X>(scalars_along_columns<X>(rows), panels_, count, ranges.r[i].begin, ranges.r[i].end,
                               depth_, to, ahead);
    }

  private:
    const X* panels_;
    int64_t depth_;
};

INTERFORMER_ISA_END
