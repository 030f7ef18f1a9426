#include "cpu/attention.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/checks.h"
#include "cpu/attention_checks.h"
#include "cpu/level.h"
#include "cpu/parallel.h"
#include "cpu/rotary_tables.h"
#include "cpu/rows.h"

namespace interformer {

QueryLayout parse_query_layout(const std::string& name) {
    if (name == "packed") return QueryLayout::packed;
    if (name == "dense") return QueryLayout::dense;
    if (name == "shared") return QueryLayout::shared;
    throw std::invalid_argument("layout must be packed, dense or shared, found " + name);
}

namespace {

// A call as the kernels see it, and the rows that it points to.
class Call {
  public:
    AttentionProblem problem;
    Rows keys;
    std::optional<Rows> own_queries;

    explicit Call(const AttentionInputs& in)
        : keys(in.kv_offsets, in.k.shape[0], in.skip_prefix), layout_(in.layout), tokens_(in.q.shape[0]) {
        if (in.q_offsets) own_queries.emplace(*in.q_offsets, in.q.shape[0]);
        AttentionProblem& p = problem;
        p.rows = keys.count();
        p.heads = in.q.shape[in.q.axes - 2];
        p.kv_heads = in.k.shape[1];
        p.head_size = in.k.shape[2];
        p.value_size = (in.v ? *in.v : in.k).shape[2];
        p.key_begins = keys.begins();
        p.key_counts = keys.counts();
        if (layout_ == QueryLayout::packed) {
            p.query_begins = queries().begins();
            p.query_counts = queries().counts();
        } else {
            p.queries = in.q.shape[in.q.axes - 3];
        }
        p.most_queries = layout_ == QueryLayout::packed ? queries().longest() : p.queries;
        p.most_keys = keys.longest();
        p.q = like_output(in.q);
        p.k = like_keys(in.k);
        p.v = like_keys(in.v ? *in.v : in.k);
        p.v_is_k = !in.v;
        if (in.gate) p.gate = like_output(*in.gate);
        set_options(in);
    }

    const Rows& queries() const { return own_queries ? *own_queries : keys; }
    bool packed() const { return layout_ == QueryLayout::packed; }
    // Rows that overlap (offsets that are wrong) write the same tokens: for one thread only.
    bool ordered() const { return keys.ordered() && (!packed() || queries().ordered()); }

    RowTensor like_keys(const TensorView& x) const {
        return {x.data, problem.key_begins, 0, x.strides[0], x.strides[1], x.strides[2], true};
    }
    // A tensor laid out as the queries and the output are.
    RowTensor like_output(const TensorView& x) const {
        const int64_t* s = x.strides;
        if (layout_ == QueryLayout::packed) return {x.data, problem.query_begins, 0, s[0], s[1], s[2], true};
        if (x.axes == 4) return {x.data, nullptr, s[0], s[1], s[2], s[3], true};
        return {x.data, nullptr, 0, s[0], s[1], s[2], true};  // shared queries
    }

    RowTensor without_channels(const TensorView& x) const {
        const int64_t* s = x.strides;
        if (packed()) return {x.data, problem.query_begins, 0, s[0], s[1], 0, true};
        return {x.data, nullptr, s[0], s[1], s[2], 0, true};
    }
    int64_t tokens() const { return tokens_; }

    double work(int64_t row) const {
        const double queries = problem.query_counts ? problem.query_counts[row] : problem.queries;
        const double keys = problem.key_counts[row];
        const double group = problem.heads / problem.kv_heads;
        constexpr double kOverhead = 16;  // what a token costs beside the products, in keys
        return queries * group * (keys + kOverhead) + keys * kOverhead + kOverhead;
    }

  private:
    void set_options(const AttentionInputs& in) {
        AttentionProblem& p = problem;
        p.causal = in.causal;
        p.window_left = in.window_left;
        p.window_right = in.window_right;
        p.num_prefix = in.num_prefix;
        if (in.cos) p.rope = rotary_tables(*in.cos, *in.sin, in.rope_interleaved);
        p.positions_q = positions_of(in.positions_q);
        p.positions_k = positions_of(in.positions_k);
        p.scale = in.scale;
        p.post_scale = in.post_scale;
        p.score = in.score;
        p.gating = in.gating;
    }

    QueryLayout layout_;
    int64_t tokens_;  // of packed queries, the tail included
};

// Nothing was seen by the queries that no row holds: their log-sum-exp is -inf.
template <typename A>
void blind_gaps(const Rows& rows, const TensorView& lse) {
    rows.for_gaps([&](int64_t begin, int64_t end) {
        std::fill_n(static_cast<A*>(lse.data) + begin * lse.shape[1], (end - begin) * lse.shape[1],
                    -std::numeric_limits<A>::infinity());
    });
}

void run_tasks(const Call& call, const Runs& runs, int64_t threads, int64_t bytes,
               const std::function<void(int64_t first, int64_t last, int64_t kv_head, int64_t run, void*)>& kernel) {
    const AttentionProblem& p = call.problem;
    const int64_t tasks = runs.count() * p.kv_heads;
    const double multiply_adds = runs.total() * static_cast<double>(p.kv_heads * (p.head_size + p.value_size));
    const int active = worthwhile_threads(call.ordered() ? threads : 1, tasks, static_cast<int64_t>(multiply_adds));
    ThreadMemory memory(active, bytes);
    parallel_for(active, tasks, [&](int64_t task, int thread) {
        const int64_t run = runs.in_order(task / p.kv_heads);
        kernel(runs.cut(run), runs.cut(run + 1), task % p.kv_heads, run, memory.of(thread));
    });
}

// ---------------------------------------------------------------- sums of the backward

// A gradient that is summed over rows, tokens or heads: kept for each run of rows (where rows are summed), each token
// that is kept and each head, then added up in order. `to` is dense, [kept tokens, heads or 1, channels].
template <typename A>
class Sums {
  public:
    Sums(const TensorView& to, int64_t runs, int64_t kept, int64_t heads)
        : to_(to),
          runs_(runs),
          kept_(kept),
          heads_(heads),
          heads_to_(to.shape[to.axes - 2]),
          channels_(to.shape[to.axes - 1]),
          own_(runs == 1 && heads_to_ == heads ? 0 : runs * run_size()),
          sums_(own_.empty() ? static_cast<A*>(to.data) : own_.data()) {
        if (own_.empty()) std::fill_n(sums_, run_size(), A(0));
    }

    int64_t run_size() const { return kept_ * heads_ * channels_; }

    // How kernels reach a query's sum; strides of 0 where rows or tokens are summed.
    RowTensor tensor(const int64_t* begins, bool rows_kept, bool tokens_kept, int64_t row_tokens) {
        const int64_t token = heads_ * channels_;
        const bool by_begins = begins != nullptr && rows_kept;
        return {sums_,                 by_begins ? begins : nullptr,
                by_begins || !rows_kept ? 0 : row_tokens * token, tokens_kept ? token : 0,
                channels_,             1,
                true};
    }

    void write() {
        if (own_.empty()) return;
        for (int64_t run = 1; run < runs_; ++run)
            for (int64_t i = 0; i < run_size(); ++i) sums_[i] += sums_[run * run_size() + i];
        A* to = static_cast<A*>(to_.data);
        for (int64_t token = 0; token < kept_; ++token)
            for (int64_t h = 0; h < heads_; ++h)
                for (int64_t c = 0; c < channels_; ++c) {
                    const A x = sums_[(token * heads_ + h) * channels_ + c];
                    A& sum = to[(token * heads_to_ + (heads_to_ == 1 ? 0 : h)) * channels_ + c];
                    sum = heads_to_ == 1 && h > 0 ? sum + x : x;
                }
    }

  private:
    const TensorView& to_;
    int64_t runs_, kept_, heads_, heads_to_, channels_;
    std::vector<A> own_;  // empty where nothing is summed: then sums are made where they shall be
    A* sums_;
};

// The gate's gradient, [Tq | 1, H | 1, Dv | 1] or [B | 1, N | 1, H | 1, Dv | 1], as sums.
template <typename A>
Sums<A> gate_sums(Call& call, const TensorView& grad, int64_t runs) {
    AttentionProblem& p = call.problem;
    const int64_t* n = grad.shape;
    const bool packed = call.packed();
    const bool rows_kept = packed ? n[0] != 1 || call.tokens() == 1 : n[0] == p.rows;
    const bool tokens_kept = packed ? rows_kept : n[1] == p.queries;
    const int64_t kept = packed ? n[0] : n[0] * n[1];
    Sums<A> sums(grad, rows_kept ? 1 : runs, kept, p.heads);
    p.grad_gate = sums.tensor(p.query_begins, rows_kept, tokens_kept, packed ? 0 : n[1]);
    p.gate_channels = n[grad.axes - 1];
    p.gate_run = rows_kept ? 0 : sums.run_size();
    return sums;
}

template <typename A>
void backward_in(Call& call, const AttentionInputs& in, const AttentionGradients& grads, int64_t threads) {
    AttentionProblem& p = call.problem;
    // Fewer runs where their sums would take more than a few MiB.
    const bool sums_over_rows = in.layout == QueryLayout::shared || in.gate;
    const int64_t most_sums = (int64_t{1} << 20) / std::max<int64_t>(1, p.queries * p.heads * (p.head_size + p.value_size));
    const Runs runs(p.rows, sums_over_rows ? std::clamp<int64_t>(most_sums, 8, kMostRuns) : kMostRuns,
                    [&](int64_t row) { return call.work(row); });
    std::optional<Sums<A>> of_queries, of_gate;
    p.shared_queries = in.layout == QueryLayout::shared;
    if (p.shared_queries) {
        of_queries.emplace(grads.grad_q, runs.count(), p.queries, p.heads);
        p.grad_q = of_queries->tensor(nullptr, false, true, 0);
        p.query_run = of_queries->run_size();
    } else {
        p.grad_q = call.like_output(grads.grad_q);
        if (call.packed()) zero_gaps(call.queries(), grads.grad_q);
    }
    if (grads.grad_gate) of_gate.emplace(gate_sums<A>(call, *grads.grad_gate, runs.count()));
    const Kernels& native = kernels(in.k.dtype);
    run_tasks(call, runs, threads, native.attention_backward_memory(p),
              [&](int64_t first, int64_t last, int64_t kv_head, int64_t run, void* memory) {
                  native.attention_backward(p, first, last, kv_head, run, memory);
              });
    if (of_queries) of_queries->write();
    if (of_gate) of_gate->write();
}

}  // namespace

void attention_forward(const AttentionInputs& in, const AttentionOutputs& to, int64_t threads) {
    const Checks check("attention_forward");
    check_inputs(check, in);
    check_outputs(check, in, to);
    Call call(in);
    AttentionProblem& p = call.problem;
    p.out = call.like_output(to.out);
    if (to.residual) p.residual = call.like_output(*to.residual);
    if (to.attended) p.attended = call.like_output(*to.attended);
    if (to.lse) p.lse = call.without_channels(*to.lse);
    if (call.packed()) {
        zero_gaps(call.queries(), to.out);
        if (to.attended) zero_gaps(call.queries(), *to.attended);
        if (to.lse && to.lse->dtype == DType::float64) blind_gaps<double>(call.queries(), *to.lse);
        if (to.lse && to.lse->dtype == DType::float32) blind_gaps<float>(call.queries(), *to.lse);
    }
    const Runs runs(p.rows, kMostRuns, [&](int64_t row) { return call.work(row); });
    const Kernels& native = kernels(in.k.dtype);
    run_tasks(call, runs, threads, native.attention_forward_memory(p),
              [&](int64_t first, int64_t last, int64_t kv_head, int64_t, void* memory) {
                  native.attention_forward(p, first, last, kv_head, memory);
              });
}

void attention_backward(const AttentionInputs& in, const AttentionGradients& grads, int64_t threads) {
    const Checks check("attention_backward");
    check_inputs(check, in);
    check_gradients(check, in, grads);
    Call call(in);
    AttentionProblem& p = call.problem;
    p.grad_out = call.like_output(grads.grad_out);
    if (grads.attended) p.attended = call.like_output(*grads.attended);
    p.grad_k = call.like_keys(grads.grad_k);
    zero_gaps(call.keys, grads.grad_k);
    if (grads.grad_v) {
        p.grad_v = call.like_keys(*grads.grad_v);
        zero_gaps(call.keys, *grads.grad_v);
    }
    if (in.k.dtype == DType::float64)
        backward_in<double>(call, in, grads, threads);
    else
        backward_in<float>(call, in, grads, threads);
}

}  // namespace interformer
