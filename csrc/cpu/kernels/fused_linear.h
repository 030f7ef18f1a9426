// Linear layers of packed tokens with what surrounds them: layer norm, activation and gate before the product, bias and
// residual behind it, in blocks of tokens that stay in the caches.
#pragma once

#include "cpu/kernel_table.h"
#include "cpu/kernels/fused_linear_prologue.h"
#include "cpu/kernels/multiply.h"

INTERFORMER_ISA_BEGIN

template <typename T>
class FusedLinear {
  public:
    using A = Acc<T>;

    // ---------------------------------------------------------------- operands that all tasks read

    // The weight in panels, W' for the forward and W for the backward, and the bias; all widened and padded with zeros.
    static int64_t packed_bytes(const LinearProblem& p, bool backward) { return Packed(p, backward, nullptr).bytes; }

    static void pack(const LinearProblem& p, bool backward, void* memory) {
        const Packed to(p, backward, memory);
        const int64_t E = p.inputs, F = p.outputs;
        fill(to.bias, to.columns, A(0));
        if (p.bias.given && !backward) widen(address<T>(p.bias, 0, 0, 0), p.bias.channel, F, to.bias);
        if (!backward) return pack_rows(p, to);
        for (int64_t n = 0; n < to.columns; n += kPanel<A>) {
            A* panel = to.panels + n * to.depth;
            const int64_t width = min(kPanel<A>, E - n);
            fill(panel, to.depth * kPanel<A>, A(0));
            for (int64_t k = 0; k < F; ++k)
                widen(address<T>(p.weight, 0, k, 0) + n * p.weight.channel, p.weight.channel, width,
                      panel + k * kPanel<A>);
        }
    }

    // ---------------------------------------------------------------- forward

    static int64_t memory(const LinearProblem& p, bool backward) { return FusedLinear(p, backward, nullptr).bytes_; }

    static void forward(const LinearProblem& p, int64_t first, int64_t last, void* memory) {
        const FusedLinear linear(p, false, memory);
        for (int64_t t = first; t < last; t += kBlock) linear.forward_block(t, min(kBlock, last - t));
        if (p.stream) finish_streams();
    }

    // ---------------------------------------------------------------- backward

    static int64_t sums_bytes(const LinearProblem& p) { return Sums(p, nullptr).bytes; }

    static void backward(const LinearProblem& p, int64_t first, int64_t last, void* memory, void* sums) {
        const FusedLinear linear(p, true, memory);
        const Sums to(p, sums);
        fill(to.weight, p.outputs * to.columns, A(0));
        fill(to.vectors, 2 * to.columns + to.bias_columns, A(0));
        for (int64_t t = first; t < last; t += kBlock) linear.backward_block(t, min(kBlock, last - t), to);
        if (p.stream) finish_streams();
    }

    static void add_sums(const LinearProblem& p, const void* sums, int64_t tasks, int64_t first, int64_t last) {
        const int64_t bytes = sums_bytes(p), E = p.inputs;
        const auto of_task = [&](int64_t task) {
            return Sums(p, const_cast<char*>(static_cast<const char*>(sums)) + task * bytes);
        };
        for (int64_t f = first; f < last; ++f)
            add(
                tasks, E, address<T>(p.grad_weight, 0, f, 0),
                [&](const Sums& to) { return to.weight + f * to.columns; }, of_task);
        if (first > 0) return;
        if (p.grad_bias.given)
            add(tasks, p.outputs, address<T>(p.grad_bias, 0, 0, 0), [](const Sums& to) { return to.bias; }, of_task);
        if (p.grad_norm_weight.given)
            add(
                tasks, E, address<T>(p.grad_norm_weight, 0, 0, 0), [](const Sums& to) { return to.norm_weight; },
                of_task);
        if (p.grad_norm_bias.given)
            add(tasks, E, address<T>(p.grad_norm_bias, 0, 0, 0), [](const Sums& to) { return to.norm_bias; }, of_task);
    }

  private:
    static constexpr int64_t kBlock = 8 * kTileRows;  // tokens

    // The operands of all tasks.
    struct Packed {
        int64_t columns, depth, bytes;
        A *panels, *bias, *rows;

        Packed(const LinearProblem& p, bool backward, void* memory)
            : columns(round_up(backward ? p.inputs : p.outputs, kPanel<A>)), depth(backward ? p.outputs : p.inputs) {
            Arena arena(memory);
            panels = arena.allocate<A>(columns * depth);
            bias = arena.allocate<A>(columns);
            rows = arena.allocate<A>(backward ? 0 : kPanel<A> * round_up(p.inputs, kLanes<A>));
            bytes = arena.bytes();
        }
    };

    // W' in panels: rows of W transposed, widened a panel at a time.
    static void pack_rows(const LinearProblem& p, const Packed& to) {
        const int64_t stride = round_up(p.inputs, kLanes<A>);
        for (int64_t n = 0; n < p.outputs; n += kPanel<A>) {
            const int64_t width = min(kPanel<A>, p.outputs - n);
            for (int64_t i = 0; i < width; ++i)
                widen(address<T>(p.weight, 0, n + i, 0), p.weight.channel, p.inputs, to.rows + i * stride);
            pack_transposed<A>({to.rows, stride}, width, p.inputs, to.panels + n * to.depth);
        }
    }

    // The partial sums of a task.
    struct Sums {
        int64_t columns, bias_columns, bytes;
        A *weight, *vectors, *bias, *norm_weight, *norm_bias;

        Sums(const LinearProblem& p, void* memory)
            : columns(round_up(p.inputs, kLanes<A>)), bias_columns(round_up(p.outputs, kLanes<A>)) {
            Arena arena(memory);
            weight = arena.allocate<A>(p.outputs * columns);
            vectors = arena.allocate<A>(2 * columns + bias_columns);
            bytes = arena.bytes();
            norm_weight = vectors;
            norm_bias = vectors + columns;
            bias = vectors + 2 * columns;
        }
    };

    template <typename Of, typename OfTask>
    static void add(int64_t tasks, int64_t count, T* to, Of&& of, OfTask&& of_task) {
        constexpr int64_t kStep = 64;
        for (int64_t begin = 0; begin < count; begin += kStep) {
            const int64_t width = min(kStep, count - begin);
            double total[kStep] = {};
            for (int64_t task = 0; task < tasks; ++task) {
                const A* sum = of(of_task(task)) + begin;
                for (int64_t i = 0; i < width; ++i) total[i] += static_cast<double>(sum[i]);
            }
            for (int64_t i = 0; i < width; ++i) store(to[begin + i], static_cast<A>(total[i]));
        }
    }

    FusedLinear(const LinearProblem& problem, bool backward, void* memory)
        : p(problem),
          prologue_(problem),
          packed_(problem, backward, const_cast<void*>(problem.packed)),
          stream_(problem.stream && may_stream(problem.out, problem.outputs)),
          x_stride_(round_up(problem.inputs, kPanel<A>)),
          y_stride_(round_up(problem.outputs, kPanel<A>)) {
        Arena arena(memory);
        x_ = arena.allocate<A>(kBlock * x_stride_);
        y_ = arena.allocate<A>(kBlock * y_stride_);
        grad_ = arena.allocate<A>(backward ? kBlock * x_stride_ : 0);
        sums_ = arena.allocate<A>(backward ? 2 * x_stride_ + y_stride_ : 0);
        prologue_.allocate(arena, kBlock, memory != nullptr);
        bytes_ = arena.bytes();
    }

    // Whether rows of a tensor can be read or written as they are, by whole vectors.
    template <typename E>
    static bool in_place(const RowTensor& x, int64_t channels) {
        return std::is_same_v<E, A> && x.channel == 1 && channels % kLanes<A> == 0;
    }

    // Whether a token's vectors of elements lie at multiples of their size.
    static bool may_stream(const RowTensor& x, int64_t channels) {
        constexpr int64_t kBytes = kLanes<A> * static_cast<int64_t>(sizeof(T));
        return channels % kLanes<A> == 0 && reinterpret_cast<uintptr_t>(x.data) % kBytes == 0;
    }

    Matrix<A> tokens(const RowTensor& x, int64_t t) const {
        return {reinterpret_cast<A*>(address<T>(x, 0, t, 0)), x.token};
    }

    // The prologue of the tokens [t, t + count), padded with zeros.
    Matrix<const A> inputs(int64_t t, int64_t count) const {
        if (prologue_.empty() && in_place<T>(p.x, p.inputs)) return {tokens(p.x, t).data, p.x.token};
        for (int64_t i = 0; i < count; ++i) {
            A* to = x_ + i * x_stride_;
            prologue_.forward(t + i, i, to);
            fill(to + p.inputs, x_stride_ - p.inputs, A(0));
        }
        return {x_, x_stride_};
    }

    void forward_block(int64_t t, int64_t count) const {
        const Matrix<const A> x = inputs(t, count);
        const int64_t columns = round_up(p.outputs, kLanes<A>);
        const bool plain = !p.bias.given && !p.residual.given;
        const bool direct = plain && !stream_ && in_place<T>(p.out, p.outputs);
        const Matrix<A> y = direct ? tokens(p.out, t) : Matrix<A>{y_, y_stride_};
        multiply_packed<A>({x.data, x.stride, 1}, packed_.panels, count, 0, columns, p.inputs, y);
        if (direct) return;
        for (int64_t i = 0; i < count; ++i) finish(y.from(i).data, t + i);
    }

    // Adds bias and residual of a token, and rounds it.
    void finish(const A* y, int64_t t) const {
        constexpr int64_t W = kLanes<A>;
        T* out = address<T>(p.out, 0, t, 0);
        const T* residual = p.residual.given ? address<T>(p.residual, 0, t, 0) : nullptr;
        const bool whole = residual == nullptr || p.residual.channel == 1;
        int64_t f = 0;
        if (whole)
            for (; f + W <= p.outputs; f += W) {
                Vector<A> x = load_vector(y + f) + load_vector(packed_.bias + f);
                if (residual != nullptr) x += load_wide(residual + f);
                if (stream_)
                    stream_wide(out + f, x);
                else
                    store_wide(out + f, x);
            }
        for (; f < p.outputs; ++f) {
            const A x = y[f] + packed_.bias[f];
            store(out[f], residual == nullptr ? x : x + load(residual[f * p.residual.channel]));
        }
    }

    void backward_block(int64_t t, int64_t count, const Sums& to) const {
        const Matrix<const A> x = inputs(t, count);
        const Matrix<const A> grad_out = output_gradients(t, count);
        if (p.grad_bias.given) add_rows(grad_out, count, to.bias_columns, to.bias);
        multiply<A>({grad_out.data, 1, grad_out.stride}, x, p.outputs, to.columns, count, {to.weight, to.columns},
                    true);
        const bool direct = prologue_.empty() && !prologue_.streams() && in_place<T>(p.grad_x, p.inputs);
        const Matrix<A> grad = direct ? tokens(p.grad_x, t) : Matrix<A>{grad_, x_stride_};
        multiply_packed<A>({grad_out.data, grad_out.stride, 1}, packed_.panels, count, 0, to.columns, p.outputs, grad);
        if (direct) return;
        if (p.norm_weight.given) fill(sums_, 2 * to.columns, A(0));
        for (int64_t i = 0; i < count; ++i) prologue_.backward(t + i, i, grad.from(i).data, sums_, sums_ + to.columns);
        if (p.norm_weight.given)
            for (int64_t e = 0; e < 2 * to.columns; ++e) to.norm_weight[e] += sums_[e];
    }

    Matrix<const A> output_gradients(int64_t t, int64_t count) const {
        if (in_place<T>(p.grad_out, p.outputs)) return {tokens(p.grad_out, t).data, p.grad_out.token};
        for (int64_t i = 0; i < count; ++i) {
            A* to = y_ + i * y_stride_;
            widen(address<T>(p.grad_out, 0, t + i, 0), p.grad_out.channel, p.outputs, to);
            fill(to + p.outputs, y_stride_ - p.outputs, A(0));
        }
        return {y_, y_stride_};
    }

    static void add_rows(Matrix<const A> rows, int64_t count, int64_t columns, A* to) {
        for (int64_t f = 0; f < columns; f += kLanes<A>) {
            Vector<A> sum{};
            for (int64_t i = 0; i < count; ++i) sum += load_vector(rows.from(i).data + f);
            store_vector(to + f, load_vector(to + f) + sum);
        }
    }

    const LinearProblem& p;
    LinearPrologue<T> prologue_;
    const Packed packed_;
    bool stream_;
    int64_t x_stride_, y_stride_, bytes_;
    A *x_, *y_, *grad_, *sums_;
};

INTERFORMER_ISA_END
