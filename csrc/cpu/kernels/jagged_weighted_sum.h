// Sums of each row's values with the tokens' weights, and their gradients. Both are bound by the reading of the values,
// which are taken in the order of memory: all heads of a few tokens, then the next tokens.
#pragma once

#include "cpu/kernel_table.h"
#include "cpu/kernels/memory.h"

INTERFORMER_ISA_BEGIN

template <typename T>
class WeightedSum {
  public:
    using A = Acc<T>;

    static int64_t memory(const WeightedSumProblem& p) { return WeightedSum(p, nullptr).bytes_; }

    static void forward(const WeightedSumProblem& p, int64_t first, int64_t last, void* memory) {
        const WeightedSum sum(p, memory);
        for (int64_t row = first; row < last; ++row) sum.forward_row(row);
    }

    static void backward(const WeightedSumProblem& p, int64_t first, int64_t last, void* memory) {
        const WeightedSum sum(p, memory);
        for (int64_t row = first; row < last; ++row)
            if (p.stream && sum.may_stream())
                sum.template backward_row<true>(row);
            else
                sum.template backward_row<false>(row);
        if (p.stream) finish_streams();
    }

  private:
    static constexpr int64_t W = kLanes<A>;
    static constexpr int64_t kTokens = 32;  // added up before they are added to the row's sum

    WeightedSum(const WeightedSumProblem& problem, void* memory) : p(problem), columns_(round_up(p.channels, W)) {
        Arena arena(memory);
        sums_ = arena.allocate<A>(p.heads * columns_);
        bytes_ = arena.bytes();
    }

    // ---------------------------------------------------------------- forward

    void forward_row(int64_t row) const {
        fill(sums_, p.heads * columns_, A(0));
        for (int64_t t = 0; t < p.counts[row]; t += kTokens) {
            const int64_t count = min(kTokens, p.counts[row] - t);
            for (int64_t h = 0; h < p.heads; ++h) add_head(row, t, count, h);
        }
        for (int64_t h = 0; h < p.heads; ++h) narrow(sums_ + h * columns_, p.channels, address<T>(p.out, row, 0, h));
    }

    void add_head(int64_t row, int64_t t, int64_t count, int64_t h) const {
        const T *weights = address<T>(p.weights, row, t, h), *v = address<T>(p.v, row, t, h);
        A* sums = sums_ + h * columns_;
        int64_t c = 0;
        for (; c + 4 * W <= p.channels; c += 4 * W) add<4, 1>(weights, v + c, count, W, sums + c);
        for (; c + W <= p.channels; c += W) add<1, 4>(weights, v + c, count, W, sums + c);
        if (c < p.channels) add<1, 4>(weights, v + c, count, p.channels - c, sums + c);
    }

    // Adds a few tokens to VECTORS vectors of sums; TOKENS at a time have sums of their own, so that none waits for the
    // one before.
    template <int VECTORS, int TOKENS>
    INTERFORMER_INLINE void add(const T* weights, const T* v, int64_t count, int64_t lanes, A* sums) const {
        Vector<A> part[TOKENS][VECTORS] = {};
        const auto step = [&](int64_t t, int u) {
            const Vector<A> w = Vector<A>{} + load(weights[t * p.weights.token]);
            const T* from = v + t * p.v.token;
#pragma GCC unroll 4
            for (int i = 0; i < VECTORS; ++i)
                part[u][i] += w * (lanes == W ? load_wide(from + i * W) : load_first(from, lanes));
        };
        int64_t t = 0;
        for (; t + TOKENS <= count; t += TOKENS)
#pragma GCC unroll 4
            for (int u = 0; u < TOKENS; ++u) step(t + u, u);
        for (; t < count; ++t) step(t, 0);
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; ++i) {
#pragma GCC unroll 4
            for (int u = 1; u < TOKENS; ++u) part[0][i] += part[u][i];
            store_vector(sums + i * W, load_vector(sums + i * W) + part[0][i]);
        }
    }

    // ---------------------------------------------------------------- backward

    template <bool STREAM>
    void backward_row(int64_t row) const {
        // The gradient of the row's sum; channels behind the last are 0.
        fill(sums_, p.heads * columns_, A(0));
        for (int64_t h = 0; h < p.heads; ++h) widen(address<T>(p.out, row, 0, h), 1, p.channels, sums_ + h * columns_);
        for (int64_t t = 0; t < p.counts[row]; ++t)
            for (int64_t h = 0; h < p.heads; ++h) backward_token<STREAM>(row, t, h);
    }

    template <bool STREAM>
    INTERFORMER_INLINE void backward_token(int64_t row, int64_t t, int64_t h) const {
        const Vector<A> w = Vector<A>{} + load(*address<T>(p.weights, row, t, h));
        const T* v = address<T>(p.v, row, t, h);
        T* grad_v = address<T>(p.grad_v, row, t, h);
        const A* grad = sums_ + h * columns_;
        Vector<A> dot{};
        int64_t c = 0;
        for (; c + W <= p.channels; c += W) {
            const Vector<A> g = load_vector(grad + c);
            dot += load_wide(v + c) * g;
            if constexpr (STREAM)
                stream_wide(grad_v + c, w * g);
            else
                store_wide(grad_v + c, w * g);
        }
        if (const int64_t lanes = p.channels - c; lanes > 0) {
            const Vector<A> g = load_vector(grad + c);
            dot += load_first(v + c, lanes) * g;
            store_first(grad_v + c, lanes, w * g);
        }
        store(*address<T>(p.grad_weights, row, t, h), reduce_lanes<A>(dot, Plus{}));
    }

    // Whether vectors of elements of grad_v lie at multiples of their size.
    bool may_stream() const {
        constexpr int64_t kBytes = W * static_cast<int64_t>(sizeof(T));
        return p.channels % W == 0 && reinterpret_cast<uintptr_t>(p.grad_v.data) % kBytes == 0;
    }

    const WeightedSumProblem& p;
    int64_t columns_, bytes_;
    A* sums_;
};

INTERFORMER_ISA_END
