// The matrix products of attention, over ranges of columns of the scores. A column is a key of the row.
#pragma once

#include "cpu/kernels/multiply.h"

INTERFORMER_ISA_BEGIN

// A range of columns: `begin` is a multiple of the panel, `end` of the vector.
struct Columns {
    int64_t begin, end;
};

// At most two ranges of columns, in order: the prefix and the rest, or one range that covers both.
struct ColumnRanges {
    Columns r[2];
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

// The keys or values of a row as one operand of products along the channels. They are packed in panels, or read in
// place for few queries, where packing would cost more than it saves.
template <typename T>
class PackedOperand {
  public:
    using S = Stored<T>;
    using X = Operand<T>;

    // Packs those of the `count` tokens that lie in the ranges. `channels` includes the padding of a token; `panels` is
    // memory for the packed copy.
    PackedOperand(Matrix<const S> tokens, int64_t count, const ColumnRanges& ranges, int64_t channels, int64_t queries,
                  X* panels)
        : tokens_(along_columns<X>(tokens)),
          panels_(queries > kDotQueries ? panels : nullptr),
          count_(count),
          depth_(channels / kNumbers<X>) {
        for (int i = 0; panels_ && i < ranges.n; ++i) {
            const int64_t begin = ranges.r[i].begin, end = min(ranges.r[i].end, count_);
            pack_transposed<X>(tokens_.from(begin), end - begin, depth_, panels + begin * depth_);
        }
    }

    // to[., j] = rows . token j, for the columns j of the ranges.
    void multiply(Matrix<const S> rows, int64_t count, const ColumnRanges& ranges, Matrix<Acc<T>> to) const {
        for (int i = 0; i < ranges.n; ++i) multiply(rows, count, ranges.r[i], to);
    }

  private:
    static constexpr int64_t kDotQueries = 8;  // up to this many queries, products are plain dot products

    void multiply(Matrix<const S> rows, int64_t count, Columns columns, Matrix<Acc<T>> to) const {
        if (panels_)
            multiply_packed<X>(scalars_along_columns<X>(rows), panels_, count, columns.begin, columns.end, depth_, to);
        else
            multiply_dots<X>(along_columns<X>(rows), tokens_.from(columns.begin), count,
                             min(columns.end, count_) - columns.begin, depth_, {to.data + columns.begin, to.stride});
    }

    Matrix<const X> tokens_;
    const X* panels_;
    int64_t count_, depth_;
};

INTERFORMER_ISA_END
