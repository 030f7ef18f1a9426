// Matrix products of small operands, the one inner loop that all kernels share:
//
//     C[m, n] (+)= sum over k of a[m, k] * B[k, n]
//
// Numbers of `a` are broadcast one by one, so it may be read along either axis; B and C are read by the vector. The
// order of summation is k's, whatever the sizes, so a result's bits depend on its own row and column alone.
#pragma once

#include "cpu/kernels/level.h"

INTERFORMER_LEVEL_BEGIN

// A matrix read one number at a time.
template <typename A>
struct Scalars {
    const A* data;
    int64_t row, column;  // strides

    Scalars from(int64_t m, int64_t k) const { return {data + m * row + k * column, row, column}; }
};

// A matrix whose rows are read by the vector; rows are `stride` apart.
template <typename A>
struct Matrix {
    A* data;
    int64_t stride;
};

template <typename A, int M, int N>
inline void multiply_tile(Scalars<A> a, const A* b, int64_t b_stride, int64_t depth, A* c, int64_t c_stride, bool add) {
    constexpr int64_t W = kLanes<A>;
    Vector<A> sum[M][N];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) sum[m][n] = Vector<A>{};
    for (int64_t k = 0; k < depth; ++k) {
        Vector<A> row[N];
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) row[n] = load_vector(b + k * b_stride + n * W);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const A x = a.data[m * a.row + k * a.column];
#pragma GCC unroll 2
            for (int n = 0; n < N; ++n) sum[m][n] += x * row[n];
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) {
            A* to = c + m * c_stride + n * W;
            // What is there is added last: a long sum that is made in pieces then errs as the sum of its pieces does.
            store_vector(to, add ? load_vector(to) + sum[m][n] : sum[m][n]);
        }
}

template <typename A, int N>
void multiply_columns(Scalars<A> a, const A* b, int64_t b_stride, int64_t rows, int64_t depth, Matrix<A> c, bool add) {
    int64_t m = 0;
    for (; m + kTileRows <= rows; m += kTileRows)
        multiply_tile<A, kTileRows, N>(a.from(m, 0), b, b_stride, depth, c.data + m * c.stride, c.stride, add);
    for (; m + 3 <= rows; m += 3)
        multiply_tile<A, 3, N>(a.from(m, 0), b, b_stride, depth, c.data + m * c.stride, c.stride, add);
    for (; m < rows; ++m)
        multiply_tile<A, 1, N>(a.from(m, 0), b, b_stride, depth, c.data + m * c.stride, c.stride, add);
}

// C [rows, columns] with B's rows read in place; `columns` is a multiple of the vector.
template <typename A>
void multiply(Scalars<A> a, Matrix<const A> b, int64_t rows, int64_t columns, int64_t depth, Matrix<A> c, bool add) {
    int64_t n = 0;
    for (; n + kPanel<A> <= columns; n += kPanel<A>)
        multiply_columns<A, 2>(a, b.data + n, b.stride, rows, depth, {c.data + n, c.stride}, add);
    if (n < columns) multiply_columns<A, 1>(a, b.data + n, b.stride, rows, depth, {c.data + n, c.stride}, add);
}

// Columns [first, last) of C, multiples of the panel, with B packed in panels: see `pack_transposed`.
template <typename A>
void multiply_packed(Scalars<A> a, const A* panels, int64_t rows, int64_t first, int64_t last, int64_t depth,
                     Matrix<A> c) {
    constexpr int64_t kPiece = 128;  // of a long sum
    for (int64_t n = first; n < last; n += kPanel<A>) {
        int64_t k = 0;
        do
            multiply_columns<A, 2>(a.from(0, k), panels + n * depth + k * kPanel<A>, kPanel<A>, rows,
                                   least(kPiece, depth - k), {c.data + n, c.stride}, k > 0);
        while ((k += kPiece) < depth);
    }
}

// ---------------------------------------------------------------- transposing

template <typename A>
struct IndexOf;
template <>
struct IndexOf<float> {
    using type = int32_t;
};
template <>
struct IndexOf<double> {
    using type = int64_t;
};

// A square of `kLanes` rows of one vector each, transposed in registers: halves are exchanged, then quarters, ...
template <typename A>
inline void transpose_square(Vector<A>* rows) {
    using Index = typename IndexOf<A>::type;
    constexpr int W = kLanes<A>;
#pragma GCC unroll 4
    for (int s = W / 2; s > 0; s /= 2) {
        Vector<Index> low, high;
#pragma GCC unroll 16
        for (int lane = 0; lane < W; ++lane) {
            low[lane] = lane & s ? W + lane - s : lane;
            high[lane] = lane & s ? W + lane : lane + s;
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
            if (i & s) continue;
            const Vector<A> above = rows[i], below = rows[i + s];
            rows[i] = __builtin_shuffle(above, below, low);
            rows[i + s] = __builtin_shuffle(above, below, high);
        }
    }
}

// X [tokens, channels] transposed and cut in panels of columns: number (c, t) goes to
// `to[(t / kPanel) * channels * kPanel + c * kPanel + t % kPanel]`; tokens that fill up the last panel are 0.
template <typename A>
void pack_transposed(Matrix<const A> x, int64_t tokens, int64_t channels, A* to) {
    constexpr int64_t W = kLanes<A>;
    for (int64_t t = 0; t < round_up(tokens, kPanel<A>); t += W) {
        A* panel = to + t / kPanel<A> * kPanel<A> * channels + t % kPanel<A>;
        int64_t c = 0;
        if (t + W <= tokens)
            for (; c + W <= channels; c += W) {
                Vector<A> square[W];
#pragma GCC unroll 16
                for (int64_t i = 0; i < W; ++i) square[i] = load_vector(x.data + (t + i) * x.stride + c);
                transpose_square<A>(square);
#pragma GCC unroll 16
                for (int64_t i = 0; i < W; ++i) store_vector(panel + (c + i) * kPanel<A>, square[i]);
            }
        for (; c < channels; ++c)
            for (int64_t i = 0; i < W; ++i)
                panel[c * kPanel<A> + i] = t + i < tokens ? x.data[(t + i) * x.stride + c] : A(0);
    }
}

INTERFORMER_LEVEL_END
