// Personalised feed-forward: the tokens of each row times the row's own matrix.
#pragma once

#include <type_traits>

#include "cpu/kernel_table.h"
#include "cpu/kernels/activations.h"
#include "cpu/kernels/memory.h"
#include "cpu/kernels/multiply.h"
#include "cpu/kernels/row_products.h"

INTERFORMER_ISA_BEGIN

template <typename T>
class Ffn {
  public:
    using A = Acc<T>;

    static int64_t memory(const FfnProblem& p) { return Ffn(p, nullptr, 0).bytes_; }

    static void forward(const FfnProblem& p, int64_t first, int64_t last, void* memory) {
        const Ffn ffn(p, memory, last);
        for (int64_t row = first; row < last; ++row) ffn.forward_row(row);
        if (p.stream) finish_streams();
    }

    static void backward(const FfnProblem& p, int64_t first, int64_t last, void* memory) {
        const Ffn ffn(p, memory, last);
        for (int64_t row = first; row < last; ++row) ffn.backward_row(row);
        if (p.stream) finish_streams();
    }

  private:
    using S = Stored<T>;
    using X = Operand<T>;

    static constexpr int64_t kBlock = 8 * kTileRows;  // tokens
    static constexpr int64_t kDotTokens = 8;          // up to this many tokens of a row, W is not transposed

    Ffn(const FfnProblem& problem, void* memory, int64_t last)
        : p(problem),
          last_(last),
          columns_(round_up(p.outputs, kLanes<A>)),
          stride_(padded<X>(p.outputs)),
          x_columns_(round_up(p.inputs, kLanes<A>)) {
        Arena arena(memory);
        weight_ = arena.allocate<S>(p.inputs * stride_);
        weight_pairs_ = arena.allocate<X>(pairs(p.inputs) * columns_);
        transposed_ = arena.allocate<X>(round_up(p.inputs, kPanel<A>) * operands<X>(stride_));
        grad_weight_ = arena.allocate<A>(p.inputs * columns_);
        grad_bias_ = arena.allocate<A>(columns_);
        bias_ = arena.allocate<A>(columns_);
        zeros_ = arena.allocate<A>(max(columns_, x_columns_));
        x_ = arena.allocate<S>(kBlock * padded<X>(p.inputs));
        x_pairs_ = arena.allocate<X>(pairs(kBlock) * x_columns_);
        y_ = arena.allocate<A>(kBlock * stride_);
        grad_ = arena.allocate<A>(kBlock * stride_);
        stored_grad_ = arena.allocate<S>(kBlock * stride_);
        grad_pairs_ = arena.allocate<X>(pairs(kBlock) * columns_);
        grad_x_ = arena.allocate<A>(kBlock * x_columns_);
        bytes_ = arena.bytes();
        if (memory == nullptr) return;
        fill(zeros_, max(columns_, x_columns_), A(0));
        fill(bias_, columns_, A(0));
    }
    // The rows of a copy made by `along_rows`, if there is one.
    static int64_t pairs(int64_t rows) { return std::is_same_v<X, S> ? 0 : operands<X>(rows); }

    // ---------------------------------------------------------------- operands

    // `count` tokens, or rows of a matrix, as operands along their channels: in place where their layout allows it, or
    // copied, with channels of 0 as padding. In place there are as many channels as `multiple` allows.
    Matrix<const S> stored(const RowTensor& x, int64_t row, int64_t t, int64_t count, int64_t channels, S* copy,
                           int64_t multiple = kNumbers<X> * kLanes<X>) const {
        const T* first = address<T>(x, row, t, 0);
        const int64_t stride = padded<X>(channels);
        if constexpr (std::is_same_v<T, S>)
            if (x.channel == 1 && channels % multiple == 0 && whole_operands<X>(first, x.token))
                return {first, x.token};
        for (int64_t i = 0; i < count; ++i) {
            copy_stored(first + i * x.token, x.channel, channels, copy + i * stride);
            fill(copy + i * stride + channels, stride - channels, S{});
        }
        return {copy, stride};
    }

    // Tokens [t, t + count) of x, read operand by operand along their channels.
    Scalars<X> tokens(int64_t row, int64_t t, int64_t count) const {
        if constexpr (std::is_same_v<X, T>) return {address<T>(p.x, row, t, 0), p.x.token, p.x.channel};
        return scalars_along_columns<X>(stored(p.x, row, t, count, p.inputs, x_, kNumbers<X>));
    }

    // The same tokens, read along the tokens.
    Scalars<X> across(Scalars<X> x, int64_t count) const {
        if constexpr (std::is_same_v<X, S>) {
            return {x.data, x.column, x.row};
        } else {
            const Matrix<const S> rows{reinterpret_cast<const S*>(x.data), x.row * kNumbers<X>};
            const Matrix<const X> pairs = along_rows<X, S>(rows, count, p.inputs, x_pairs_);
            return {pairs.data, 1, pairs.stride};
        }
    }

    Matrix<const S> stored_weight(int64_t row) const { return stored(p.weight, row, 0, p.inputs, p.outputs, weight_); }
    Matrix<const X> weight_operands(Matrix<const S> weight) const {
        return along_rows<X, S>(weight, p.inputs, p.outputs, weight_pairs_);
    }
    void read_bias(int64_t row) const {
        if (p.bias.given) widen(address<T>(p.bias, row, 0, 0), p.bias.channel, p.outputs, bias_);
    }

    // Adds what the next row will read of a tensor, or write of an output that does not go past the caches.
    void fetch(const RowTensor& x, int64_t row, int64_t tokens, int64_t channels, Prefetches& ahead) const {
        if (x.channel == 1 && x.token == channels)
            ahead.add(address<T>(x, row + 1, 0, 0), tokens * channels * static_cast<int64_t>(sizeof(T)));
    }

    // ---------------------------------------------------------------- outputs

    // Rows of an output, written by whole vectors: in place, or in `memory`, to be narrowed later.
    static Matrix<A> rows_to_write(const RowTensor& x, int64_t row, int64_t t, int64_t channels, Matrix<A> memory) {
        if constexpr (std::is_same_v<T, A>)
            if (channels % kLanes<A> == 0) return {address<T>(x, row, t, 0), x.token};
        return memory;
    }
    static void narrow_rows(Matrix<A> from, int64_t count, int64_t channels, const RowTensor& x, int64_t row,
                            int64_t t) {
        if (static_cast<void*>(from.data) == address<T>(x, row, t, 0)) return;  // written in place
        for (int64_t i = 0; i < count; ++i) narrow(from.from(i).data, channels, address<T>(x, row, t + i, 0));
    }

    // Whether vectors of elements lie at multiples of their size.
    static bool may_stream(const RowTensor& x) {
        constexpr int64_t kSize = sizeof(T), kBytes = kLanes<A> * kSize;
        return reinterpret_cast<uintptr_t>(x.data) % kBytes == 0 && x.token * kSize % kBytes == 0 &&
               x.row * kSize % kBytes == 0;
    }

    // start + a b for the tokens [t, t + count) of an output, a tile of them. Whole vectors are rounded in registers.
    void multiply_to(const RowTensor& x, int64_t row, int64_t t, int64_t count, int64_t channels, Scalars<X> a,
                     Panels<X> b, int64_t depth, const A* start, A* memory, Prefetches& ahead) const {
        if (channels % kLanes<A> == 0)
            return row_products<X, T>(count, a, b, channels, depth, start, {address<T>(x, row, t, 0), x.token}, ahead,
                                      p.stream && may_stream(x));
        const int64_t columns = round_up(channels, kLanes<A>);
        row_products<X, A>(count, a, b, columns, depth, start, {memory, columns}, ahead);
        narrow_rows({memory, columns}, count, channels, x, row, t);
    }

    // ---------------------------------------------------------------- forward

    void forward_row(int64_t row) const {
        const Matrix<const X> weight = weight_operands(stored_weight(row));
        read_bias(row);
        Prefetches ahead;
        const int64_t count = p.counts[row], depth = operands<X>(p.inputs);
        if (row + 1 < last_) {
            fetch(p.weight, row, p.inputs, p.outputs, ahead);
            fetch(p.x, row, p.counts[row + 1], p.inputs, ahead);
            if (!p.stream) fetch(p.out, row, p.counts[row + 1], p.outputs, ahead);
        }
        ahead.spread(steps_of<X>(count, columns_, depth));
        const bool linear = p.activation == Activation::identity && !p.residual.given;
        for_each_tile(count, [&](int64_t t, int64_t m) {
            const Scalars<X> x = tokens(row, t, m);
            if (linear) return multiply_to(p.out, row, t, m, p.outputs, x, weight, depth, bias_, y_, ahead);
            const Matrix<A> out = rows_to_write(p.out, row, t, p.outputs, {y_, columns_});
            row_products<X, A>(m, x, weight, columns_, depth, bias_, out, ahead);
            finish(row, t, m, out);
        });
    }

    // The activation, the residual and the rounding of a tile of tokens.
    void finish(int64_t row, int64_t t, int64_t count, Matrix<A> y) const {
        if (p.activation != Activation::identity)
            for (int64_t i = 0; i < count; ++i) activate(p.activation, y.from(i).data, p.outputs);
        if (!p.residual.given) return narrow_rows(y, count, p.outputs, p.out, row, t);
        for (int64_t i = 0; i < count; ++i)
            add_residual(y.from(i).data, address<T>(p.residual, row, t + i, 0), address<T>(p.out, row, t + i, 0));
    }
    void add_residual(const A* y, const T* residual, T* out) const {
        constexpr int64_t W = kLanes<A>;
        int64_t f = 0;
        if (p.residual.channel == 1)
            for (; f + W <= p.outputs; f += W) store_wide(out + f, load_vector(y + f) + load_wide(residual + f));
        for (; f < p.outputs; ++f) store(out[f], y[f] + load(residual[f * p.residual.channel]));
    }

    // ---------------------------------------------------------------- backward

    void backward_row(int64_t row) const {
        const int64_t count = p.counts[row];
        fill(grad_bias_, columns_, A(0));
        if (count == 0) {
            fill(grad_weight_, p.inputs * columns_, A(0));
            narrow_rows({grad_weight_, columns_}, p.inputs, p.outputs, p.grad_weight, row, 0);
        } else {
            const Matrix<const S> weight = stored_weight(row);
            if (count > kDotTokens)
                pack_transposed<X>(along_columns<X>(weight), p.inputs, operands<X>(p.outputs), transposed_);
            read_bias(row);
            for (int64_t t = 0; t < count; t += kBlock) backward_block(row, t, weight);
        }
        if (p.bias.given) narrow(grad_bias_, p.outputs, address<T>(p.grad_bias, row, 0, 0));
    }

    void backward_block(int64_t row, int64_t t, Matrix<const S> weight) const {
        const int64_t count = min(kBlock, p.counts[row] - t);
        const Scalars<X> x = tokens(row, t, count);
        const Matrix<const S> grad = linear_gradient(row, t, count, x, weight);
        if (p.bias.given) add_bias_gradient(grad, count);
        Prefetches ahead;
        if (t + count == p.counts[row]) fetch_next(row, count, ahead);
        grad_weight_block(row, t, count, across(x, count), grad, ahead);
        grad_x_block(row, t, count, grad, weight, ahead);
    }

    // Adds what the next row's backward will read and write, for the products of a block of `count` tokens.
    void fetch_next(int64_t row, int64_t count, Prefetches& ahead) const {
        if (row + 1 == last_) return;
        fetch(p.weight, row, p.inputs, p.outputs, ahead);
        fetch(p.x, row, p.counts[row + 1], p.inputs, ahead);
        fetch(p.grad_out, row, p.counts[row + 1], p.outputs, ahead);
        if (!p.stream) {
            fetch(p.grad_weight, row, p.inputs, p.outputs, ahead);
            fetch(p.grad_x, row, p.counts[row + 1], p.inputs, ahead);
        }
        ahead.spread(steps_of<X>(p.inputs, columns_, operands<X>(count)) +
                     steps_of<X>(count, x_columns_, operands<X>(p.outputs)));
    }

    // grad_W = x' grad, or what a block adds to it.
    void grad_weight_block(int64_t row, int64_t t, int64_t count, Scalars<X> x, Matrix<const S> grad,
                           Prefetches& ahead) const {
        const Matrix<const X> rows = along_rows<X, S>(grad, count, p.outputs, grad_pairs_);
        const int64_t depth = operands<X>(count);
        if (count == p.counts[row])
            return for_each_tile(p.inputs, [&](int64_t e, int64_t m) {
                multiply_to(p.grad_weight, row, e, m, p.outputs, x.from(e, 0), rows, depth, zeros_, grad_weight_,
                            ahead);
            });
        const Matrix<A> sums = rows_to_write(p.grad_weight, row, 0, p.outputs, {grad_weight_, columns_});
        multiply<X>(x, rows, p.inputs, columns_, depth, sums, t > 0);
        if (t + count == p.counts[row]) narrow_rows(sums, p.inputs, p.outputs, p.grad_weight, row, 0);
    }

    // grad_x = grad W' for a block of tokens: dot products with the rows of W where the row has few tokens, else
    // products with W transposed, once for the row.
    void grad_x_block(int64_t row, int64_t t, int64_t count, Matrix<const S> grad, Matrix<const S> weight,
                      Prefetches& ahead) const {
        const int64_t depth = operands<X>(p.outputs);
        if (p.counts[row] <= kDotTokens) {
            const Matrix<A> to = rows_to_write(p.grad_x, row, t, p.inputs, {grad_x_, x_columns_});
            multiply_dots<X>(along_columns<X>(grad), along_columns<X>(weight), count, p.inputs, operands<X>(stride_),
                             to);
            return narrow_rows(to, count, p.inputs, p.grad_x, row, t);
        }
        const Scalars<X> scalars = scalars_along_columns<X>(grad);
        for_each_tile(count, [&](int64_t i, int64_t m) {
            multiply_to(p.grad_x, row, t + i, m, p.inputs, scalars.from(i, 0), Panels<X>(transposed_, depth), depth,
                        zeros_, grad_x_, ahead);
        });
    }

    // The gradient of x W + bias: grad_out, or its product with the activation's gradient.
    Matrix<const S> linear_gradient(int64_t row, int64_t t, int64_t count, Scalars<X> x, Matrix<const S> weight) const {
        if (p.activation == Activation::identity) return stored(p.grad_out, row, t, count, p.outputs, stored_grad_);
        const Matrix<const X> rows = weight_operands(weight);
        Prefetches ahead;
        for_each_tile(count, [&](int64_t i, int64_t m) {
            row_products<X, A>(m, x.from(i, 0), rows, columns_, operands<X>(p.inputs), bias_, {y_, stride_}, ahead);
            for (int64_t j = 0; j < m; ++j) {
                A* grad = grad_ + (i + j) * stride_;
                widen(address<T>(p.grad_out, row, t + i + j, 0), p.grad_out.channel, p.outputs, grad);
                fill(grad + p.outputs, stride_ - p.outputs, A(0));
                activate_with_grads(p.activation, y_ + j * stride_, grad, p.outputs);
                if constexpr (!std::is_same_v<S, A>) narrow(grad, stride_, stored_grad_ + (i + j) * stride_);
            }
        });
        if constexpr (std::is_same_v<S, A>) return {grad_, stride_};
        return {stored_grad_, stride_};
    }

    void add_bias_gradient(Matrix<const S> grad, int64_t count) const {
        for (int64_t f = 0; f < columns_; f += kLanes<A>) {
            Vector<A> total = load_vector(grad_bias_ + f);
            for (int64_t i = 0; i < count; i += 8) {  // short sums first, for their smaller error
                Vector<A> sum{};
                for (int64_t j = i; j < min(i + 8, count); ++j) sum += load_wide(grad.from(j).data + f);
                total += sum;
            }
            store_vector(grad_bias_ + f, total);
        }
    }

    const FfnProblem& p;
    int64_t last_, columns_, stride_, x_columns_, bytes_;
    S *weight_, *x_, *stored_grad_;
    X *weight_pairs_, *transposed_, *x_pairs_, *grad_pairs_;
    A *grad_weight_, *grad_bias_, *bias_, *zeros_, *y_, *grad_, *grad_x_;
};

INTERFORMER_ISA_END
