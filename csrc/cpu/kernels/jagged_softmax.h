// Softmax along the tokens of each row, head by head, and its gradient.
#pragma once

#include "cpu/kernel_table.h"
#include "cpu/kernels/elementary.h"
#include "cpu/kernels/memory.h"

INTERFORMER_ISA_BEGIN

// A row's scores as vectors, one a step. Where the heads divide a vector, it holds several tokens of all of them, and
// is read at once if tokens lie side by side; else it holds heads of one token. Sums have the same order for any
// strides.
template <typename T>
class Softmax {
  public:
    using A = Acc<T>;

    static int64_t memory(const SoftmaxProblem&) { return kKept * static_cast<int64_t>(sizeof(Vector<A>)); }

    static void forward(const SoftmaxProblem& p, int64_t first, int64_t last, void* memory) {
        for_each_run(p, first, last, [&](const Steps& steps, int64_t row, int64_t head) {
            const Softmax run(steps, source(steps, p.scores, row, head), memory);
            run.forward_run(address<T>(p.out, row, 0, head), p.out.token);
        });
    }

    static void backward(const SoftmaxProblem& p, int64_t first, int64_t last, void* memory) {
        for_each_run(p, first, last, [&](const Steps& steps, int64_t row, int64_t head) {
            const Softmax run(steps, source(steps, p.scores, row, head), memory);
            run.backward_run(source(steps, p.grad_out, row, head), address<T>(p.out, row, 0, head), p.out.token);
        });
    }

  private:
    using Lanes = Vector<typename IndexOf<A>::type>;

    static constexpr int64_t W = kLanes<A>;
    static constexpr int64_t kKept = 512;  // vectors of exponentials that are kept; those behind are computed again
    static constexpr int64_t kPart = 32;   // steps that are added up before they are added to the sum

    // The vectors of a row: `full` ones of W numbers, then `partial` ones of fewer. A vector holds `tokens` tokens.
    struct Steps {
        int64_t full, partial, lanes, tokens;
    };
    // An input of a row.
    struct Source {
        const T* at;
        int64_t token, step;
        bool whole;  // the numbers of a step lie side by side
    };

    Softmax(const Steps& steps, const Source& scores, void* memory)
        : steps_(steps), scores_(scores), kept_(static_cast<A*>(memory)) {}

    static Source source(const Steps& steps, const RowTensor& x, int64_t row, int64_t head) {
        const bool whole = steps.tokens == 1 || x.token * steps.tokens == W;
        return {address<T>(x, row, 0, head), x.token, x.token * steps.tokens, whole};
    }

    template <typename Each>
    static void for_each_run(const SoftmaxProblem& p, int64_t first, int64_t last, Each each) {
        const bool several = p.heads > 0 && W % p.heads == 0;
        for (int64_t row = first; row < last; ++row) {
            const int64_t count = p.counts[row], numbers = count * p.heads;
            if (several) {
                each(Steps{numbers / W, numbers % W != 0, numbers % W, W / p.heads}, row, int64_t{0});
                continue;
            }
            for (int64_t h = 0; h < p.heads; h += W) {
                const int64_t lanes = min(W, p.heads - h);
                each(Steps{lanes == W ? count : 0, lanes == W ? 0 : count, lanes, 1}, row, h);
            }
        }
    }

    // ---------------------------------------------------------------- steps

    // Calls `each(step, lanes)`.
    template <typename Each>
    INTERFORMER_INLINE void for_each_step(Each&& each) const {
        for (int64_t i = 0; i < steps_.full; ++i) each(i, W);
        for (int64_t i = 0; i < steps_.partial; ++i) each(steps_.full + i, steps_.lanes);
    }
    INTERFORMER_INLINE Vector<A> read(const Source& x, int64_t i, int64_t lanes) const {
        const T* from = x.at + i * x.step;
        if (!x.whole) return gather(x, from, lanes);
        return lanes == W ? load_wide(from) : load_first(from, lanes);
    }
    Vector<A> gather(const Source& x, const T* from, int64_t lanes) const {
        const int64_t heads = W / steps_.tokens;
        A numbers[W] = {};
        for (int64_t lane = 0; lane < lanes; ++lane) numbers[lane] = load(from[lane / heads * x.token + lane % heads]);
        return load_vector(numbers);
    }
    static INTERFORMER_INLINE void write(T* to, int64_t lanes, Vector<A> x) {
        if (lanes == W) return store_wide(to, x);
        store_first(to, lanes, x);
    }
    // The scores of a step; the lanes that hold none are -inf.
    INTERFORMER_INLINE Vector<A> score(int64_t i, int64_t lanes) const {
        const Vector<A> x = read(scores_, i, lanes);
        if (lanes == W) return x;
        Lanes lane;
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) lane[j] = j;
        return lane < static_cast<typename IndexOf<A>::type>(lanes) ? x : Vector<A>{} - A(__builtin_inff());
    }

    // Reduces the lanes of each head, so that each has its head's result: by halves, in one order for all of them.
    template <int64_t Half = W / 2, typename Op>
    INTERFORMER_INLINE Vector<A> fold(Vector<A> x, Op op) const {
        if constexpr (Half > 0) {
            if (steps_.tokens * Half < W) return x;  // fewer lanes than a token has
            Lanes other;
#pragma GCC unroll 16
            for (int lane = 0; lane < W; ++lane) other[lane] = lane ^ Half;
            return fold<Half / 2>(op(x, __builtin_shuffle(x, other)), op);
        } else {
            return x;
        }
    }

    // Sums of sums: a large sum is rounded less often.
    struct Sum {
        Vector<A> part{}, whole{};

        INTERFORMER_INLINE void add(int64_t i, Vector<A> x) {
            part += x;
            if (i % kPart != kPart - 1) return;
            whole += part;
            part = Vector<A>{};
        }
        INTERFORMER_INLINE Vector<A> total() const { return whole + part; }
    };

    // ---------------------------------------------------------------- softmax

    // The largest score of each head; 0 where all are -inf, whose exponentials are then 0.
    Vector<A> largest() const {
        const Vector<A> none = Vector<A>{} - A(__builtin_inff());
        Vector<A> most = none;
        for_each_step([&](int64_t i, int64_t lanes) { most = Max{}(score(i, lanes), most); });
        most = fold(most, Max{});
        return most == none ? Vector<A>{} : most;
    }

    INTERFORMER_INLINE Vector<A> exponential_of_step(const PowerOfTwo<A>& power, Vector<A> most, int64_t i,
                                                     int64_t lanes) const {
        return power((score(i, lanes) - most) * A(1.44269504088896340736));
    }
    // The same, kept from before where there is room.
    INTERFORMER_INLINE Vector<A> kept(const PowerOfTwo<A>& power, Vector<A> most, int64_t i, int64_t lanes) const {
        return i < kKept ? load_vector(kept_ + i * W) : exponential_of_step(power, most, i, lanes);
    }
    INTERFORMER_INLINE void keep(int64_t i, Vector<A> x) const {
        if (i < kKept) store_vector(kept_ + i * W, x);
    }
    // 1 / sum; 0 where nothing was visible.
    static INTERFORMER_INLINE Vector<A> inverse(Vector<A> sum) { return sum == A(0) ? Vector<A>{} : A(1) / sum; }

    void forward_run(T* out, int64_t token) const {
        const int64_t step = token * steps_.tokens;
        const PowerOfTwo<A> power(0);
        const Vector<A> most = largest();
        Sum sum;
        for_each_step([&](int64_t i, int64_t lanes) {
            const Vector<A> e = exponential_of_step(power, most, i, lanes);
            keep(i, e);
            sum.add(i, e);
        });
        const Vector<A> factor = inverse(fold(sum.total(), Plus{}));
        for_each_step(
            [&](int64_t i, int64_t lanes) { write(out + i * step, lanes, kept(power, most, i, lanes) * factor); });
    }

    void backward_run(const Source& grad, T* out, int64_t token) const {
        const int64_t step = token * steps_.tokens;
        const PowerOfTwo<A> power(0);
        const Vector<A> most = largest();
        Sum sum, products;
        for_each_step([&](int64_t i, int64_t lanes) {
            const Vector<A> e = exponential_of_step(power, most, i, lanes);
            keep(i, e);
            sum.add(i, e);
            products.add(i, e * read(grad, i, lanes));
        });
        const Vector<A> factor = inverse(fold(sum.total(), Plus{}));
        const Vector<A> delta = fold(products.total(), Plus{}) * factor;
        for_each_step([&](int64_t i, int64_t lanes) {
            const Vector<A> p = kept(power, most, i, lanes) * factor;
            write(out + i * step, lanes, p * (read(grad, i, lanes) - delta));
        });
    }

    Steps steps_;
    Source scores_;
    A* kept_;
};

INTERFORMER_ISA_END
