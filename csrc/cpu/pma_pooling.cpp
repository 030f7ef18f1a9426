#include "cpu/pma_pooling.h"

#include <algorithm>
#include <optional>

#include "common/checks.h"
#include "cpu/attention.h"
#include "cpu/element.h"
#include "cpu/parallel.h"
#include "cpu/pma_pooling_problem.h"
#include "cpu/vector.h"

namespace interformer {
namespace pma {

Sizes checked_sizes(const Checks& check, const PmaPoolingInputs& in) {
    check.floating("k", in.k);
    const DType dtype = in.k.dtype;
    check.tensor("k", in.k, dtype, {{"T"}, {"Hk"}, {"D"}});
    check.contiguous_last_axis("k", in.k);
    check.index("offsets", in.offsets);
    if (in.offsets.shape[0] < 1) check.refuse("offsets", "[B+1] with at least one entry", describe(in.offsets));
    Sizes n{in.offsets.shape[0] - 1, 0, 0, in.k.shape[1], in.k.shape[0], in.k.shape[2], in.k.shape[2]};
    check.tensor("seeds", in.seeds, dtype, {{"M"}, {"H"}, {"D", n.D}});
    n.M = in.seeds.shape[0];
    n.H = in.seeds.shape[1];
    if (n.Hk < 1 || n.H % n.Hk != 0)
        check.refuse("seeds", "of a number of heads that k's " + std::to_string(n.Hk) + " divides", describe(in.seeds));
    if (in.v) {
        check.tensor("v", *in.v, dtype, {{"T", n.T}, {"Hk", n.Hk}, {"Dv"}});
        check.contiguous_last_axis("v", *in.v);
        n.Dv = in.v->shape[2];
    }
    if (in.gate) check_like_output(check, n, "gate", *in.gate, dtype);
    if (in.skip_prefix < 0) check.refuse("skip_prefix", "at least 0", std::to_string(in.skip_prefix));
    return n;
}

void check_like_output(const Checks& check, const Sizes& n, const char* argument, const TensorView& x, DType dtype) {
    check.tensor(argument, x, dtype, {{"B", n.B}, {"M", n.M}, {"H", n.H}, {"Dv", n.Dv}});
}

namespace {

template <typename T>
class Forward {
  public:
    using A = Acc<T>;

    Forward(const Problem<T>& problem, const PmaPoolingOutputs& to)
        : p(problem),
          out_(to.out),
          residual_(typed<Strided<const T, 4>>(to.residual)),
          lse_(typed<Strided<A, 3>>(to.lse)),
          attended_(typed<Strided<T, 4>>(to.attended)) {}

    void run(int64_t threads) const {
        const int64_t tasks = p.n.B * p.n.Hk;
        const int active = worthwhile_threads(threads, tasks, p.n.multiply_adds());
        Scratch<A> memory(active, (kTile + 1 + p.n.queries()) * p.n.Dv + kTile * (p.n.D + 1));
        Scratch<RunningSoftmax<A>> softmax(active, p.n.queries());
        parallel_for(active, tasks, [&](int64_t task, int thread) {
            attend(task / p.n.Hk, task % p.n.Hk, memory.of(thread), softmax.of(thread));
        });
    }

  private:
    void attend(int64_t row, int64_t kv_head, A* memory, RunningSoftmax<A>* softmax) const {
        const int64_t S = p.n.queries(), D = p.n.D, Dv = p.n.Dv;
        A* attended = memory;             // [S, Dv]
        A* partial = attended + S * Dv;   // [Dv]: of one tile
        A* weights = partial + Dv;        // [kTile]
        A* key_buffer = weights + kTile;  // [kTile, D]
        A* value_buffer = key_buffer + kTile * D;
        std::fill_n(attended, S * Dv, A(0));
        std::fill_n(softmax, S, RunningSoftmax<A>());

        const Span span = p.attended_span(row);
        for_tiles(span, [&](Span tokens) {
            const int64_t count = tokens.size();
            const Tile<A> keys = p.keys(tokens, kv_head, key_buffer);
            const Tile<A> values = p.values(tokens, kv_head, keys, value_buffer);
            for (int64_t i = 0; i < S; ++i) {
                const A* seed = p.seeds.data() + (kv_head * S + i) * D;
                for (int64_t t = 0; t < count; ++t) weights[t] = p.scale * dot(seed, keys[t], D);
                const A shrink = weigh(weights, count, softmax[i]);
                std::fill_n(partial, Dv, A(0));
                for (int64_t t = 0; t < count; ++t) add_scaled(weights[t], values[t], Dv, partial);
                A* sum = attended + i * Dv;
                for (int64_t c = 0; c < Dv; ++c) sum[c] = sum[c] * shrink + partial[c];
            }
        });
        p.for_queries_of(kv_head, [&](int64_t i, int64_t m, int64_t h) {
            const int64_t here = i - kv_head * S;
            A* a = attended + here * Dv;
            if (lse_) *lse_->at(row, m, h) = softmax[here].log_sum();
            if (!p.score.softmax)
                for (int64_t c = 0; c < Dv; ++c) a[c] *= p.post_scale;
            else if (span.size() > 0)
                for (int64_t c = 0; c < Dv; ++c) a[c] /= softmax[here].sum;
            finish(row, m, h, a);
        });
    }

    // Scores of a tile become weights; returns the factor of what was summed before.
    A weigh(A* scores, int64_t count, RunningSoftmax<A>& softmax) const {
        if (p.score.softmax) return softmax.soften(scores, count);
        for (int64_t t = 0; t < count; ++t) scores[t] = activate(p.score.activation, scores[t]);
        return A(1);
    }

    // Gate, residual and output of one query.
    void finish(int64_t row, int64_t m, int64_t h, A* a) const {
        const int64_t Dv = p.n.Dv;
        if (attended_) narrow(a, Dv, attended_->at(row, m, h));
        if (p.gate) {
            const T* gate = p.gate->at(row, m, h);
            for (int64_t c = 0; c < Dv; ++c) a[c] = p.gating.apply(a[c], load(gate[c * p.gate->strides[3]]));
        }
        if (residual_) {
            const T* residual = residual_->at(row, m, h);
            for (int64_t c = 0; c < Dv; ++c) a[c] += load(residual[c * residual_->strides[3]]);
        }
        narrow(a, Dv, out_.at(row, m, h));
    }

    const Problem<T>& p;
    Strided<T, 4> out_;
    std::optional<Strided<const T, 4>> residual_;
    std::optional<Strided<A, 3>> lse_;
    std::optional<Strided<T, 4>> attended_;
};

}  // namespace
}  // namespace pma

void pma_pooling_forward(const PmaPoolingInputs& in, const PmaPoolingOutputs& to, int64_t threads) {
    const Checks check("pma_pooling_forward");
    const pma::Sizes n = pma::checked_sizes(check, in);
    const DType dtype = in.k.dtype;
    pma::check_like_output(check, n, "out", to.out, dtype);
    check.contiguous_last_axis("out", to.out);
    if (to.residual) pma::check_like_output(check, n, "residual", *to.residual, dtype);
    if (to.attended) {
        pma::check_like_output(check, n, "attended", *to.attended, dtype);
        check.contiguous_last_axis("attended", *to.attended);
    }
    if (to.lse) {
        const DType exact = dtype == DType::float64 ? DType::float64 : DType::float32;
        check.tensor("lse", *to.lse, exact, {{"B", n.B}, {"M", n.M}, {"H", n.H}});
        if (!in.score.softmax) check.refuse("lse", "None without softmax", describe(*to.lse));
    }
    with_element_type(dtype, [&](auto element) {
        const pma::Problem<decltype(element)> problem(n, in);
        pma::Forward<decltype(element)>(problem, to).run(threads);
    });
}

}  // namespace interformer
