#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "common/checks.h"
#include "cpu/attention.h"
#include "cpu/element.h"
#include "cpu/parallel.h"
#include "cpu/pma_pooling.h"
#include "cpu/pma_pooling_problem.h"
#include "cpu/vector.h"

namespace interformer {
namespace pma {

namespace {

// The gate's gradient [B | 1, M | 1, H | 1, Dv | 1]: what broadcast is summed. A row's sum is made by itself first.
template <typename T>
class GateGradient {
  public:
    using A = Acc<T>;

    explicit GateGradient(const TensorView& grad)
        : to_(grad), B_(grad.shape[0]), M_(grad.shape[1]), H_(grad.shape[2]), C_(grad.shape[3]) {}

    int64_t row_size() const { return M_ * H_ * C_; }
    bool over_rows(int64_t rows) const { return B_ == 1 && rows != 1; }

    // Adds the gradient of one query's gate to the row's sum.
    void add(const A* grad, int64_t channels, int64_t m, int64_t h, A* row_sum) const {
        A* to = row_sum + ((M_ == 1 ? 0 : m) * H_ + (H_ == 1 ? 0 : h)) * C_;
        if (C_ == channels) {
            for (int64_t c = 0; c < channels; ++c) to[c] += grad[c];
        } else {
            A sum = 0;
            for (int64_t c = 0; c < channels; ++c) sum += grad[c];
            to[0] += sum;
        }
    }

    void write(int64_t row, const A* row_sum) const {
        for (int64_t m = 0; m < M_; ++m)
            for (int64_t h = 0; h < H_; ++h) narrow(row_sum + (m * H_ + h) * C_, C_, to_.at(row, m, h));
    }

  private:
    Strided<T, 4> to_;
    int64_t B_, M_, H_, C_;
};

// Sums over rows: each run of rows adds up its own, then the runs are added in order. The runs come from the offsets.
template <typename A>
class RunSums {
  public:
    RunSums(int64_t runs, int64_t size) : runs_(runs), size_(size), sums_(runs * size) {}

    A* of(int64_t run) { return sums_.data() + run * size_; }

    // Elements [first, first + count) summed over the runs.
    void total(int64_t first, int64_t count, A* to) const {
        std::fill_n(to, count, A(0));
        for (int64_t run = 0; run < runs_; ++run)
            for (int64_t i = 0; i < count; ++i) to[i] += sums_[run * size_ + first + i];
    }

  private:
    int64_t runs_, size_;
    std::vector<A> sums_;
};

// One thread's memory, and what it holds of the row at hand.
template <typename A>
struct Workspace {
    A* grad_a;        // [Hk, queries, Dv]: gradient of A
    A* gate_row;      // the row's gate gradient
    A* delta;         // [queries]: mean of the weights' gradients under the weights, before the softmax's division
    A* weights;       // [queries, kTile]: scores first, then the weights of v in A
    A* slopes;        // [queries, kTile]: gradients of the weights first, then of <seed, key>
    A* key_buffer;    // [kTile, D]
    A* value_buffer;  // [kTile, Dv]
    A* channels;      // [2, max(D, Dv)]

    Workspace(const Sizes& n, int64_t gate_size, A* memory) {
        for (auto [part, size] : layout(n, gate_size)) {
            this->*part = memory;
            memory += size;
        }
    }

    static int64_t size(const Sizes& n, int64_t gate_size) {
        int64_t total = 0;
        for (auto [part, size] : layout(n, gate_size)) total += size;
        return total;
    }

  private:
    struct Part {
        A* Workspace::* pointer;
        int64_t size;
    };

    static std::array<Part, 8> layout(const Sizes& n, int64_t gate_size) {
        const int64_t all = n.M * n.H, tile = n.queries() * kTile;
        return {{{&Workspace::grad_a, all * n.Dv},
                 {&Workspace::gate_row, gate_size},
                 {&Workspace::delta, n.queries()},
                 {&Workspace::weights, tile},
                 {&Workspace::slopes, tile},
                 {&Workspace::key_buffer, kTile * n.D},
                 {&Workspace::value_buffer, kTile * n.Dv},
                 {&Workspace::channels, 2 * std::max(n.D, n.Dv)}}};
    }
};

template <typename T>
class Backward {
  public:
    using A = Acc<T>;

    Backward(const Problem<T>& problem, const PmaPoolingGradients& grads)
        : p(problem),
          grad_out_(grads.grad_out),
          attended_(typed<Strided<const T, 4>>(grads.attended)),
          grad_seeds_(grads.grad_seeds),
          grad_k_(grads.grad_k),
          grad_v_(typed<Strided<T, 3>>(grads.grad_v)) {
        if (grads.grad_gate) gate_.emplace(*grads.grad_gate);
    }

    void run(int64_t threads) const {
        const int64_t gate_size = gate_ ? gate_->row_size() : 0;
        const int64_t sum_size = std::max<int64_t>(1, static_cast<int64_t>(p.seeds.size()) + gate_size);
        const std::vector<int64_t> cuts = p.rows.cuts(std::clamp(kMostSums / sum_size, kFewestRuns, kMostRuns));
        const int64_t runs = static_cast<int64_t>(cuts.size()) - 1;
        RunSums<A> seed_sums(runs, p.seeds.size());
        RunSums<A> gate_sums(runs, gate_ && gate_->over_rows(p.n.B) ? gate_size : 0);

        // Rows overlap where offsets are wrong: one thread, then, since two would write the same tokens.
        const int64_t useful = p.rows.ordered() ? threads : 1;
        const int active = worthwhile_threads(useful, runs, 3 * p.n.multiply_adds());
        Scratch<A> memory(active, Workspace<A>::size(p.n, gate_size));
        Scratch<RunningSoftmax<A>> softmax(active, p.n.queries());
        zero_outside(active);
        parallel_for(active, runs, [&](int64_t run, int thread) {
            Workspace<A> w(p.n, gate_size, memory.of(thread));
            for (int64_t row = cuts[run]; row < cuts[run + 1]; ++row)
                one_row(row, w, softmax.of(thread), seed_sums.of(run), gate_sums.of(run));
        });
        write_sums(seed_sums, gate_sums, gate_size);
    }

  private:
    // Enough runs to keep many threads busy; fewer where their sums would take more than a few MiB.
    static constexpr int64_t kMostRuns = 128, kFewestRuns = 8, kMostSums = 1 << 20;

    void one_row(int64_t row, const Workspace<A>& w, RunningSoftmax<A>* softmax, A* seed_sum, A* gate_sum) const {
        through_epilogue(row, w, gate_sum);
        const Span whole = p.rows.span(row), span = p.attended_span(row);
        zero_tokens({whole.begin, std::min(span.begin, whole.end)});
        for (int64_t kv_head = 0; kv_head < p.n.Hk; ++kv_head) {
            if (p.score.softmax) measure(span, kv_head, w, softmax);
            for_tiles(span, [&](Span tokens) { one_tile(span, tokens, kv_head, w, softmax, seed_sum); });
        }
    }

    // From grad_out to the gradients of A and of the gate.
    void through_epilogue(int64_t row, const Workspace<A>& w, A* gate_sum) const {
        const int64_t Dv = p.n.Dv;
        p.for_queries([&](int64_t i, int64_t m, int64_t h) {
            widen(grad_out_.at(row, m, h), grad_out_.strides[3], Dv, w.grad_a + i * Dv);
        });
        if (!gate_) return;
        std::fill_n(w.gate_row, gate_->row_size(), A(0));
        p.for_queries([&](int64_t i, int64_t m, int64_t h) { through_gate(row, i, m, h, w); });
        if (gate_->over_rows(p.n.B))
            for (int64_t j = 0; j < gate_->row_size(); ++j) gate_sum[j] += w.gate_row[j];
        else
            gate_->write(row, w.gate_row);
    }

    void through_gate(int64_t row, int64_t i, int64_t m, int64_t h, const Workspace<A>& w) const {
        A* grad_a = w.grad_a + i * p.n.Dv;
        A* grad_gate = w.channels;
        const T* attended = attended_->at(row, m, h);
        const T* gate = p.gate->at(row, m, h);
        for (int64_t c = 0; c < p.n.Dv; ++c) {
            A to_a, to_gate;
            p.gating.slopes(load(attended[c * attended_->strides[3]]), load(gate[c * p.gate->strides[3]]), to_a,
                            to_gate);
            grad_gate[c] = grad_a[c] * to_gate;
            grad_a[c] *= to_a;
        }
        gate_->add(grad_gate, p.n.Dv, m, h, w.gate_row);
    }

    // Scores of a tile, and the gradients of their weights.
    void score(Span tokens, int64_t kv_head, const Tile<A>& keys, const Tile<A>& values, const Workspace<A>& w) const {
        for (int64_t here = 0; here < p.n.queries(); ++here) {
            const int64_t i = kv_head * p.n.queries() + here;
            for (int64_t t = 0; t < tokens.size(); ++t) {
                w.weights[here * kTile + t] = p.scale * dot(p.seeds.data() + i * p.n.D, keys[t], p.n.D);
                w.slopes[here * kTile + t] = dot(w.grad_a + i * p.n.Dv, values[t], p.n.Dv);
            }
        }
    }

    // The softmax of a row and `delta`, from the scores again: taking them from lse and <grad_a, A> would save this
    // pass on long rows, but doubles the error of short ones, since both are rounded where their differences count.
    void measure(Span span, int64_t kv_head, const Workspace<A>& w, RunningSoftmax<A>* softmax) const {
        std::fill_n(softmax, p.n.queries(), RunningSoftmax<A>());
        std::fill_n(w.delta, p.n.queries(), A(0));
        for_tiles(span, [&](Span tokens) {
            const Tile<A> keys = p.keys(tokens, kv_head, w.key_buffer);
            score(tokens, kv_head, keys, p.values(tokens, kv_head, keys, w.value_buffer), w);
            for (int64_t here = 0; here < p.n.queries(); ++here) {
                A* weights = w.weights + here * kTile;
                const A shrink = softmax[here].soften(weights, tokens.size());
                w.delta[here] = w.delta[here] * shrink + dot(weights, w.slopes + here * kTile, tokens.size());
            }
        });
    }

    void one_tile(Span span, Span tokens, int64_t kv_head, const Workspace<A>& w, const RunningSoftmax<A>* softmax,
                  A* seed_sum) const {
        const int64_t S = p.n.queries(), D = p.n.D, count = tokens.size();
        const Tile<A> keys = p.keys(tokens, kv_head, w.key_buffer);
        const bool measured = p.score.softmax && span.size() <= kTile;  // then the row's one tile is still at hand
        if (!measured) score(tokens, kv_head, keys, p.values(tokens, kv_head, keys, w.value_buffer), w);
        for (int64_t here = 0; here < S; ++here) {
            const int64_t i = kv_head * S + here;
            A* weights = w.weights + here * kTile;
            A* slopes = w.slopes + here * kTile;
            if (p.score.softmax) {
                if (!measured) softmax[here].exponentials(weights, count);
                softmax_slopes(softmax[here].sum, w.delta[here], weights, slopes, count);
            } else {
                activation_slopes(weights, slopes, count);
            }
            A* partial = w.channels;
            std::fill_n(partial, D, A(0));
            for (int64_t t = 0; t < count; ++t) add_scaled(slopes[t], keys[t], D, partial);
            add_scaled(A(1), partial, D, seed_sum + i * D);
        }
        for (int64_t t = 0; t < count; ++t) token_gradients(tokens.begin + t, t, kv_head, w);
    }

    void softmax_slopes(A sum, A delta, A* weights, A* slopes, int64_t count) const {
        for (int64_t t = 0; t < count; ++t) {
            weights[t] /= sum;
            slopes[t] = weights[t] * (slopes[t] - delta / sum) * p.scale;
        }
    }

    void activation_slopes(A* weights, A* slopes, int64_t count) const {
        for (int64_t t = 0; t < count; ++t) {
            const ValueAndSlope<A> act = activate_with_slope(p.score.activation, weights[t]);
            weights[t] = p.post_scale * act.value;
            slopes[t] = p.post_scale * act.slope * slopes[t] * p.scale;
        }
    }

    // The gradients of k and v at one token; where v is k they are one.
    void token_gradients(int64_t token, int64_t t, int64_t kv_head, const Workspace<A>& w) const {
        const int64_t S = p.n.queries(), D = p.n.D, Dv = p.n.Dv;
        A* grad_k = w.channels;
        A* grad_v = p.v_is_k ? grad_k : grad_k + D;
        std::fill_n(grad_k, p.v_is_k ? D : D + Dv, A(0));
        for (int64_t here = 0; here < S; ++here) {
            const int64_t i = kv_head * S + here;
            add_scaled(w.slopes[here * kTile + t], p.seeds.data() + i * D, D, grad_k);
            add_scaled(w.weights[here * kTile + t], w.grad_a + i * Dv, Dv, grad_v);
        }
        narrow(grad_k, D, grad_k_.at(token, kv_head));
        if (!p.v_is_k) narrow(grad_v, Dv, grad_v_->at(token, kv_head));
    }

    void zero_tokens(Span tokens) const {
        for (int64_t token = tokens.begin; token < tokens.end; ++token)
            for (int64_t kv_head = 0; kv_head < p.n.Hk; ++kv_head) {
                std::fill_n(grad_k_.at(token, kv_head), p.n.D, T{});
                if (grad_v_) std::fill_n(grad_v_->at(token, kv_head), p.n.Dv, T{});
            }
    }

    // Tokens that belong to no row. With these every token is written, whatever the offsets hold: between the first and
    // the last offset, some pair of neighbours has it between them.
    void zero_outside(int threads) const {
        constexpr int64_t kChunk = 1024;
        const auto zero = [&](Span span) {
            parallel_for(threads, (span.size() + kChunk - 1) / kChunk, [&](int64_t chunk, int) {
                const int64_t first = span.begin + chunk * kChunk;
                zero_tokens({first, std::min(first + kChunk, span.end)});
            });
        };
        zero(p.rows.head());
        zero(p.rows.tail());
    }

    void write_sums(const RunSums<A>& seed_sums, const RunSums<A>& gate_sums, int64_t gate_size) const {
        std::vector<A> total(std::max(p.n.D, gate_size));
        p.for_queries([&](int64_t i, int64_t m, int64_t h) {
            seed_sums.total(i * p.n.D, p.n.D, total.data());
            narrow(total.data(), p.n.D, grad_seeds_.at(m, h));
        });
        if (gate_ && gate_->over_rows(p.n.B)) {
            gate_sums.total(0, gate_size, total.data());
            gate_->write(0, total.data());
        }
    }

    const Problem<T>& p;
    Strided<const T, 4> grad_out_;
    std::optional<Strided<const T, 4>> attended_;
    Strided<T, 3> grad_seeds_, grad_k_;
    std::optional<Strided<T, 3>> grad_v_;
    std::optional<GateGradient<T>> gate_;
};

void check_gradient(const Checks& check, const char* argument, const TensorView& grad, const char* of,
                    const TensorView& input) {
    check.like(argument, grad, of, input);
    check.contiguous_last_axis(argument, grad);
}

// `given` is there just where `wanted` is.
void check_pair(const Checks& check, const char* argument, bool wanted, const std::optional<TensorView>& given) {
    if (wanted == given.has_value()) return;
    check.refuse(argument, wanted ? "given" : "None", given ? describe(*given) : "None");
}

void check_gate_gradient(const Checks& check, const Sizes& n, const TensorView& grad, DType dtype) {
    check.tensor("grad_gate", grad, dtype, {{"B or 1"}, {"M or 1"}, {"H or 1"}, {"Dv or 1"}});
    check.contiguous_last_axis("grad_gate", grad);
    const int64_t full[] = {n.B, n.M, n.H, n.Dv};
    for (int axis = 0; axis < 4; ++axis)
        if (grad.shape[axis] != 1 && grad.shape[axis] != full[axis])
            check.refuse("grad_gate", "of size 1 or the output's on every axis", describe(grad));
}

}  // namespace
}  // namespace pma

void pma_pooling_backward(const PmaPoolingInputs& in, const PmaPoolingGradients& grads, int64_t threads) {
    const Checks check("pma_pooling_backward");
    const pma::Sizes n = pma::checked_sizes(check, in);
    const DType dtype = in.k.dtype;
    pma::check_like_output(check, n, "grad_out", grads.grad_out, dtype);
    pma::check_gradient(check, "grad_seeds", grads.grad_seeds, "seeds", in.seeds);
    pma::check_gradient(check, "grad_k", grads.grad_k, "k", in.k);
    pma::check_pair(check, "grad_v", in.v.has_value(), grads.grad_v);
    if (in.v) pma::check_gradient(check, "grad_v", *grads.grad_v, "v", *in.v);
    pma::check_pair(check, "attended", in.gate.has_value(), grads.attended);
    pma::check_pair(check, "grad_gate", in.gate.has_value(), grads.grad_gate);
    if (in.gate) {
        pma::check_like_output(check, n, "attended", *grads.attended, dtype);
        pma::check_gate_gradient(check, n, *grads.grad_gate, dtype);
    }
    with_element_type(dtype, [&](auto element) {
        const pma::Problem<decltype(element)> problem(n, in);
        pma::Backward<decltype(element)>(problem, grads).run(threads);
    });
}

}  // namespace interformer
