// All rows of folded pooling share these operands: the seeds with W_k folded in, transposed for products with queries
// in lanes, and W_v as the operand of its product.
#pragma once

#include "cpu/kernel_table.h"
#include "cpu/kernels/memory.h"
#include "cpu/kernels/operands.h"

INTERFORMER_ISA_BEGIN

template <typename T>
class FoldedWeights {
  public:
    using A = Acc<T>;
    using X = Operand<T>;

    static int64_t memory(const FoldedProblem& p) { return FoldedWeights(p, nullptr).bytes_; }

    static void prepare(const FoldedProblem& p, void* shared) {
        const FoldedWeights weights(p, shared);
        weights.fold();
        weights.transpose_value_weight();
    }

    FoldedWeights(const FoldedProblem& p, void* shared)
        : p_(p),
          units_(p.pooling.queries * p.pooling.heads),
          width_(p.pooling.head_size),
          head_stride_(round_up(p.head_size, W)) {
        Arena arena(shared);
        const int64_t padded_units = round_up(units_, kPanel<A>);
        queries_ = arena.allocate<X>(operands<X>(width_) * padded_units);
        value_weight_ = arena.allocate<A>(p.pooling.heads * width_ * head_stride_);
        value_bias_ = arena.allocate<A>(p.pooling.heads * head_stride_);
        folded_ = arena.allocate<A>(units_ * width_);
        weight_ = arena.allocate<A>(p.head_size * width_);
        seed_ = arena.allocate<A>(p.head_size);
        bytes_ = arena.bytes();
    }

    // The queries of the tile that begins at `unit`, [operands of E, units of the tile]: a tile has two vectors of
    // units, the last one maybe one.
    const X* queries(int64_t unit) const { return queries_ + unit * operands<X>(width_); }
    Matrix<const A> value_weight(int64_t head) const {  // [E, D]
        return {value_weight_ + head * width_ * head_stride_, head_stride_};
    }
    const A* value_bias() const { return value_bias_; }   // [H, D]; zeros where none was given
    int64_t head_stride() const { return head_stride_; }  // numbers between two heads' rows of D: whole vectors

  private:
    static constexpr int64_t W = kLanes<A>;

    // Unit m * H + h: sum over d of seeds[m, h, d] * W_k[h, d].
    void fold() const {
        for (int64_t head = 0; head < p_.pooling.heads; ++head) {
            read_weight(p_.key_weight, head, {weight_, width_});
            for (int64_t m = 0; m < p_.pooling.queries; ++m) {
                A* to = folded_ + (m * p_.pooling.heads + head) * width_;
                fill(to, width_, A(0));
                widen(address<T>(p_.seeds, 0, m, head), p_.seeds.channel, p_.head_size, seed_);
                for (int64_t d = 0; d < p_.head_size; ++d)
                    for (int64_t e = 0; e < width_; ++e) to[e] += seed_[d] * weight_[d * width_ + e];
            }
        }
        // The sign of the scale, and a scale of 0, go into the queries, as `ScoreVariant` asks.
        const double scale = p_.pooling.variant.scale;
        const A sign = scale < 0 ? A(-1) : scale == 0 ? A(0) : A(1);
        for (int64_t unit = 0; unit < units_; unit += kPanel<A>) {
            const int64_t count = min(kPanel<A>, units_ - unit), lanes = count > W ? kPanel<A> : W;
            X* to = queries_ + unit * operands<X>(width_);
            for (int64_t k = 0; k < operands<X>(width_); ++k)
                for (int64_t i = 0; i < lanes; ++i)  // further lanes repeat the last unit
                    to[k * lanes + i] = operand(folded_ + (unit + min(i, count - 1)) * width_, k, sign);
        }
    }

    // Operand k of a row.
    X operand(const A* row, int64_t k, A sign) const {
        if constexpr (kNumbers<X> == 1) {
            return row[k] * sign;
        } else {
            BFloat16 low, high{};
            store(low, row[2 * k] * sign);
            if (2 * k + 1 < width_) store(high, row[2 * k + 1] * sign);
            return low.bits | static_cast<X>(high.bits) << 16;
        }
    }

    // W_v's heads as [E, D], padded with zeros to whole vectors.
    void transpose_value_weight() const {
        const int64_t size = p_.head_size;
        for (int64_t head = 0; head < p_.pooling.heads; ++head) {
            A* to = value_weight_ + head * width_ * head_stride_;
            read_weight(p_.value_weight, head, {weight_, width_});
            for (int64_t e = 0; e < width_; ++e) {
                for (int64_t d = 0; d < size; ++d) to[e * head_stride_ + d] = weight_[d * width_ + e];
                fill(to + e * head_stride_ + size, head_stride_ - size, A(0));
            }
            A* bias = value_bias_ + head * head_stride_;
            fill(bias, head_stride_, A(0));
            if (p_.value_bias.given) widen(address<T>(p_.value_bias, 0, 0, head), p_.value_bias.channel, size, bias);
        }
    }

    // A head's weight [D, E]; the axis whose numbers lie side by side is read in the inner loop.
    void read_weight(const RowTensor& x, int64_t head, Matrix<A> to) const {
        const T* from = address<T>(x, 0, 0, head);
        if (x.token == 1 && x.channel != 1) {
            for (int64_t e = 0; e < width_; ++e)
                for (int64_t d = 0; d < p_.head_size; ++d) to.data[d * to.stride + e] = load(from[e * x.channel + d]);
        } else {
            for (int64_t d = 0; d < p_.head_size; ++d) widen(from + d * x.token, x.channel, width_, to.from(d).data);
        }
    }

    const FoldedProblem& p_;
    const int64_t units_, width_, head_stride_;
    X* queries_;
    A *value_weight_, *value_bias_;
    A *folded_, *weight_, *seed_;  // used by `prepare` alone
    int64_t bytes_;
};

INTERFORMER_ISA_END
