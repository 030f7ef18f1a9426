// Personalised feed-forward: the tokens of each row times the row's own matrix.
#pragma once

#include <type_traits>

#include "cpu/kernel_table.h"
#include "cpu/kernels/activations.h"
#include "cpu/kernels/memory.h"
#include "cpu/kernels/multiply.h"

INTERFORMER_ISA_BEGIN

template <typename T>
class Ffn {
  public:
    using A = Acc<T>;

    static int64_t memory(const FfnProblem& p) { return Ffn(p, nullptr).bytes_; }

    static void forward(const FfnProblem& p, int64_t first, int64_t last, void* memory) {
        const Ffn ffn(p, memory);
        for (int64_t row = first; row < last; ++row) {
            const Matrix<const A> weight = ffn.read_weight(row);
            for (int64_t t = 0; t < p.counts[row]; t += kBlock) ffn.forward_block(row, t, weight);
        }
    }

    static void backward(const FfnProblem& p, int64_t first, int64_t last, void* memory) {
        const Ffn ffn(p, memory);
        for (int64_t row = first; row < last; ++row) ffn.backward_row(row);
    }

  private:
    static constexpr int64_t kBlock = 8 * kTileRows;  // tokens
    static constexpr int64_t kDotTokens = 8;          // up to this many tokens of a row, W is not transposed

    Ffn(const FfnProblem& problem, void* memory)
        : p(problem), stride_(round_up(p.outputs, kLanes<A>)), x_stride_(round_up(p.inputs, kPanel<A>)) {
        Arena arena(memory);
        weight_ = arena.allocate<A>(p.inputs * stride_);
        transposed_ = arena.allocate<A>(x_stride_ * p.outputs);
        grad_weight_ = arena.allocate<A>(p.inputs * stride_);
        grad_bias_ = arena.allocate<A>(stride_);
        bias_ = arena.allocate<A>(stride_);
        x_ = arena.allocate<A>(kBlock * x_stride_);
        y_ = arena.allocate<A>(kBlock * stride_);
        grad_ = arena.allocate<A>(kBlock * stride_);
        scratch_ = arena.allocate<A>(stride_);
        bytes_ = arena.bytes();
    }

    // Returns the row's matrix as rows of numbers of type A, in place or copied with columns of 0 as padding. The bias
    // is copied to `bias_`.
    Matrix<const A> read_weight(int64_t row) const {
        if (p.bias.given) widen(address<T>(p.bias, row, 0, 0), p.bias.channel, p.outputs, bias_);
        if constexpr (std::is_same_v<T, A>)
            if (p.weight.channel == 1 && p.outputs % kLanes<A> == 0)
                return {address<T>(p.weight, row, 0, 0), p.weight.token};
        for (int64_t e = 0; e < p.inputs; ++e) {
            A* to = weight_ + e * stride_;
            widen(address<T>(p.weight, row, e, 0), p.weight.channel, p.outputs, to);
            fill(to + p.outputs, stride_ - p.outputs, A(0));
        }
        return {weight_, stride_};
    }

    // Tokens [t, t + count) of x, read number by number.
    Scalars<A> tokens(int64_t row, int64_t t, int64_t count) const {
        if constexpr (std::is_same_v<T, A>) return {address<T>(p.x, row, t, 0), p.x.token, p.x.channel};
        for (int64_t i = 0; i < count; ++i)
            widen(address<T>(p.x, row, t + i, 0), p.x.channel, p.inputs, x_ + i * x_stride_);
        return {x_, x_stride_, 1};
    }

    // y = x W + bias for a block of tokens.
    void linear(Scalars<A> x, Matrix<const A> weight, int64_t count, Matrix<A> y) const {
        multiply<A>(x, weight, count, stride_, p.inputs, y, false);
        if (!p.bias.given) return;
        for (int64_t i = 0; i < count; ++i)
            for (int64_t f = 0; f < p.outputs; ++f) y.from(i).data[f] += bias_[f];
    }

    // Rows of an output, written by whole vectors: in place, or in `memory`, to be narrowed later.
    static Matrix<A> rows_to_write(const RowTensor& x, int64_t row, int64_t t, int64_t channels, Matrix<A> memory) {
        if constexpr (std::is_same_v<T, A>)
            if (channels == memory.stride) return {address<T>(x, row, t, 0), x.token};
        return memory;
    }
    static void narrow_rows(Matrix<A> from, int64_t count, int64_t channels, const RowTensor& x, int64_t row,
                            int64_t t) {
        if (static_cast<void*>(from.data) == address<T>(x, row, t, 0)) return;  // written in place
        for (int64_t i = 0; i < count; ++i) narrow(from.from(i).data, channels, address<T>(x, row, t + i, 0));
    }

    void forward_block(int64_t row, int64_t t, Matrix<const A> weight) const {
        const int64_t count = min(kBlock, p.counts[row] - t);
        const Matrix<A> out = rows_to_write(p.out, row, t, p.outputs, {y_, stride_});
        linear(tokens(row, t, count), weight, count, out);
        for (int64_t i = 0; i < count; ++i) {
            A* y = out.from(i).data;
            activate(p.activation, y, p.outputs);
            if (p.residual.given) {
                widen(address<T>(p.residual, row, t + i, 0), p.residual.channel, p.outputs, scratch_);
                for (int64_t f = 0; f < p.outputs; ++f) y[f] += scratch_[f];
            }
        }
        narrow_rows(out, count, p.outputs, p.out, row, t);
    }

    // grad_x = grad W' for a block of tokens: dot products with the rows of W where the row has few tokens, else
    // products with W transposed, once for the row.
    void grad_x_block(int64_t row, int64_t t, int64_t count, Matrix<const A> grad, Matrix<const A> weight) const {
        const Matrix<A> to = rows_to_write(p.grad_x, row, t, p.inputs, {x_, x_stride_});
        if (few_tokens(row))
            multiply_dots<A>(grad, weight, count, p.inputs, stride_, to);
        else
            multiply_packed<A>(scalars_along_columns<A>(grad), transposed_, count, 0, round_up(p.inputs, kLanes<A>),
                               p.outputs, to);
        narrow_rows(to, count, p.inputs, p.grad_x, row, t);
    }
    bool few_tokens(int64_t row) const { return p.counts[row] <= kDotTokens; }

    void backward_row(int64_t row) const {
        const Matrix<const A> weight = read_weight(row);
        const Matrix<A> grad_weight = rows_to_write(p.grad_weight, row, 0, p.outputs, {grad_weight_, stride_});
        fill(grad_bias_, stride_, A(0));
        if (p.counts[row] == 0)
            for (int64_t e = 0; e < p.inputs; ++e) fill(grad_weight.from(e).data, stride_, A(0));
        else if (!few_tokens(row))
            pack_transposed<A>(weight, p.inputs, p.outputs, transposed_);
        for (int64_t t = 0; t < p.counts[row]; t += kBlock) backward_block(row, t, weight, grad_weight);
        narrow_rows(grad_weight, p.inputs, p.outputs, p.grad_weight, row, 0);
        if (p.bias.given) narrow(grad_bias_, p.outputs, address<T>(p.grad_bias, row, 0, 0));
    }

    void backward_block(int64_t row, int64_t t, Matrix<const A> weight, Matrix<A> grad_weight) const {
        const int64_t count = min(kBlock, p.counts[row] - t);
        const Scalars<A> x = tokens(row, t, count);
        const Matrix<const A> grad = linear_gradient(row, t, count, x, weight);
        multiply<A>({x.data, x.column, x.row}, grad, p.inputs, stride_, count, grad_weight, t > 0);
        if (p.bias.given) add_bias_gradient(grad, count);
        grad_x_block(row, t, count, grad, weight);  // overwrites x's memory
    }

    // The gradient of x W + bias: grad_out, or its product with the activation's gradient.
    Matrix<const A> linear_gradient(int64_t row, int64_t t, int64_t count, Scalars<A> x, Matrix<const A> weight) const {
        if constexpr (std::is_same_v<T, A>)
            if (p.activation == Activation::identity && p.grad_out.channel == 1 && p.outputs == stride_)
                return {address<T>(p.grad_out, row, t, 0), p.grad_out.token};
        const Matrix<A> grad{grad_, stride_};
        for (int64_t i = 0; i < count; ++i) {
            widen(address<T>(p.grad_out, row, t + i, 0), p.grad_out.channel, p.outputs, grad.from(i).data);
            fill(grad.from(i).data + p.outputs, stride_ - p.outputs, A(0));
        }
        if (p.activation != Activation::identity) {
            const Matrix<A> y{y_, stride_};
            linear(x, weight, count, y);
            for (int64_t i = 0; i < count; ++i)
                activate_with_grads(p.activation, y.from(i).data, grad.from(i).data, p.outputs);
        }
        return {grad_, stride_};
    }

    void add_bias_gradient(Matrix<const A> grad, int64_t count) const {
        for (int64_t f = 0; f < p.outputs; ++f) {
            A block = 0;
            for (int64_t i = 0; i < count; i += 8) {  // short sums first, for their smaller error
                A sum = 0;
                for (int64_t j = i; j < min(i + 8, count); ++j) sum += grad.from(j).data[f];
                block += sum;
            }
            grad_bias_[f] += block;
        }
    }

    const FfnProblem& p;
    int64_t stride_, x_stride_, bytes_;
    A *weight_, *transposed_, *grad_weight_, *grad_bias_, *bias_, *x_, *y_, *grad_, *scratch_;
};

INTERFORMER_ISA_END
