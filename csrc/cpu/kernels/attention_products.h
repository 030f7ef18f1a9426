// The products of the attention kernels: over columns of the scores, which are the keys of a row.
#pragma once

#include "cpu/kernels/multiply.h"

INTERFORMER_LEVEL_BEGIN

// Columns of the scores that some query of a block sees: `begin` a multiple of the panel, `end` of the vector.
struct Columns {
    int64_t begin, end;
};

// Columns in at most two runs, the first one of the prefix alone where there are two.
struct ColumnRuns {
    Columns runs[2];
    int count;
};

// `to [count, columns]` = sum over the keys j of the columns' runs of `weights[., j] * tokens[j]`. Long sums are made
// in pieces, which keeps them exact.
template <typename X>
void weighted_sums(Scalars<X> weights, Matrix<const X> tokens, const Columns* runs, int parts, int64_t keys,
                   int64_t count, int64_t columns, Matrix<SumOf<X>> to) {
    constexpr int64_t kPiece = 128 * kNumbers<X>;
    bool add = false;
    for (int i = 0; i < parts; ++i)
        for (int64_t j = runs[i].begin; j < least(runs[i].end, keys); j += kPiece) {
            const int64_t depth = operands<X>(least(kPiece, least(runs[i].end, keys) - j)), k = j / kNumbers<X>;
            multiply<X>(weights.from(0, k), tokens.from(k), count, columns, depth, to, add);
            add = true;
        }
    if (!add)
        for (int64_t i = 0; i < count; ++i) fill(to.data + i * to.stride, columns, SumOf<X>(0));
}

// Tokens of a row to be multiplied with its queries, channel by channel: as they are where queries are few, else
// packed.
template <typename T>
class Multiplicand {
  public:
    using S = Stored<T>;
    using X = Operand<T>;

    // `count` tokens, of which those of the columns will be multiplied; `channels`: of a token, as many as it is stored
    // with.
    Multiplicand(Matrix<const S> tokens, int64_t count, const ColumnRuns& columns, int64_t channels, int64_t queries,
                 X* panels)
        : tokens_(along_columns<X>(tokens)),
          panels_(queries > kFew ? panels : nullptr),
          count_(count),
          depth_(channels / kNumbers<X>) {
        for (int i = 0; panels_ && i < columns.count; ++i) {
            const int64_t begin = columns.runs[i].begin, end = least(columns.runs[i].end, count_);
            pack_transposed<X>(tokens_.from(begin), end - begin, depth_, panels + begin * depth_);
        }
    }

    // Products of rows with the tokens of the columns.
    void multiply(Matrix<const S> rows, int64_t count, Columns columns, Matrix<Acc<T>> to) const {
        if (panels_)
            multiply_packed<X>(scalars_along_columns<X>(rows), panels_, count, columns.begin, columns.end, depth_, to);
        else
            multiply_dots<X>(along_columns<X>(rows), tokens_.from(columns.begin), count,
                             least(columns.end, count_) - columns.begin, depth_, {to.data + columns.begin, to.stride});
    }

  private:
    static constexpr int64_t kFew = 8;

    Matrix<const X> tokens_;
    const X* panels_;
    int64_t count_, depth_;
};

INTERFORMER_LEVEL_END
