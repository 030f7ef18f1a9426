#include "cpu/attention.h"

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "common/checks.h"
#include "cpu/huge_pages.h"
#include "cpu/level.h"
#include "cpu/parallel.h"
#include "cpu/rotary_tables.h"
#include "cpu/rows.h"

namespace interformer {

namespace {

// A call as the kernels see it, and the rows that it points to.
class Call {
  public:
    AttentionProblem problem;
    Rows keys;
    std::optional<Rows> own_queries;

    explicit Call(const AttentionInputs& in)
        : keys(in.kv_offsets, in.k.shape[0], in.skip_prefix),
          layout_(in.layout),
          dtype_(in.k.dtype),
          tokens_(in.q.shape[0]) {
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
    int64_t useful_threads(int64_t threads) const {
        return keys.ordered() && (!packed() || queries().ordered()) ? threads : 1;
    }
    DType dtype() const { return dtype_; }

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
        constexpr int64_t kWidest = int64_t{1} << 62;  // beyond any row, and positions can be added to it
        p.window_left = std::min(in.window_left, kWidest);
        p.window_right = std::min(in.window_right, kWidest);
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
    DType dtype_;
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

// What is shared out to threads. A run of rows under all heads, which lie side by side, is one task, but for the
// heaviest runs: heads of those may find threads of their own, and parts of a row that alone would keep one thread too
// long. Nothing of this changes a result's bits.
std::vector<AttentionTask> tasks_of(const Call& call, const Runs& runs, int64_t threads, bool divisible) {
    constexpr double kHeavy = 1.0 / 64;
    const AttentionProblem& p = call.problem;
    const double share = runs.total() * static_cast<double>(p.kv_heads) / static_cast<double>(2 * threads);
    std::vector<AttentionTask> tasks;
    for (int64_t i = 0; i < runs.count(); ++i) {
        const int64_t run = runs.in_order(i), first = runs.cut(run), last = runs.cut(run + 1);
        const bool heavy = runs.work(run) > kHeavy * runs.total();
        const bool divide = divisible && threads > 1 && last - first == 1 && runs.work(run) > share;
        const int64_t parts = divide ? kernels(call.dtype()).attention_parts(p, first) : 1;
        for (int64_t head = 0, heads = heavy ? 1 : p.kv_heads; head < p.kv_heads; head += heads)
            for (int64_t part = 0; part < parts; ++part)
                tasks.push_back({first, last, head, head + heads, run, parts > 1 ? part : -1});
    }
    return tasks;
}

// `kernel(task, memory)` of every task, on as many threads as are worth it.
template <typename Kernel>
void run_tasks(const Call& call, const Runs& runs, const std::vector<AttentionTask>& tasks, int64_t threads,
               int64_t bytes, Kernel&& kernel) {
    const AttentionProblem& p = call.problem;
    const int64_t count = static_cast<int64_t>(tasks.size());
    const double multiply_adds = runs.total() * static_cast<double>(p.kv_heads * (p.head_size + p.value_size));
    const int active = worthwhile_threads(threads, count, static_cast<int64_t>(multiply_adds));
    ThreadMemory memory(active, bytes);
    parallel_for(active, count, [&](int64_t i, int thread) { kernel(tasks[i], memory.of(thread)); });
}

// The gradients of the keys of rows that are divided: a sum for each row and key/value head, to which its parts are
// added in their order, each by its own thread once the earlier ones are there. So a thread keeps one part and no more,
// however many a row has, and the order of a sum does not depend on the threads. Parts are started in order, which
// leaves no thread waiting for one that is not under way.
class RowSums {
  public:
    RowSums(const AttentionProblem& problem, const Kernels& kernels, std::vector<AttentionTask>& tasks)
        : p(problem), kernels_(kernels) {
        for (AttentionTask& task : tasks) {
            if (task.part < 0) continue;
            if (task.part == 0) {
                sums_.emplace_back(new char[kernels_.attention_sums_bytes(p, task.first_row)]);
                next_.push_back(0);
            }
            task.row_sums = sums_.back().get();
            task.divided = static_cast<int64_t>(sums_.size()) - 1;
        }
    }

    // Adds the sums that the backward of a part left in a thread's memory, once all earlier parts are in.
    void add(const AttentionTask& task, void* memory) {
        int64_t& next = next_[task.divided];
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [&] { return next == task.part; });
        lock.unlock();
        kernels_.attention_add_part(p, task, memory);
        lock.lock();
        ++next;
        changed_.notify_all();
    }

  private:
    const AttentionProblem& p;
    const Kernels& kernels_;
    std::vector<std::unique_ptr<char[]>> sums_;
    std::vector<int64_t> next_;  // part whose turn it is
    std::mutex mutex_;
    std::condition_variable changed_;
};

// ---------------------------------------------------------------- sums of the backward

// A gradient that is summed over rows, tokens or heads: kept in double for each run of rows (where rows are summed),
// each token that is kept and each head, then added up in order. `to` is dense, [kept tokens, heads or 1, channels].
class Sums {
  public:
    Sums(const TensorView& to, int64_t runs, int64_t kept, int64_t heads)
        : to_(to),
          runs_(std::max<int64_t>(runs, 1)),  // without rows the sum is still there, and is 0
          kept_(kept),
          heads_(heads),
          heads_to_(to.shape[to.axes - 2]),
          channels_(to.shape[to.axes - 1]),
          sums_(runs_ * run_size()) {}

    int64_t run_size() const { return kept_ * heads_ * channels_; }
    double* data() { return sums_.data(); }

    void write() {
        for (int64_t run = 1; run < runs_; ++run)
            for (int64_t i = 0; i < run_size(); ++i) sums_[i] += sums_[run * run_size() + i];
        if (to_.dtype == DType::float64)
            write_as<double>();
        else
            write_as<float>();
    }

  private:
    template <typename A>
    void write_as() {
        A* to = static_cast<A*>(to_.data);
        for (int64_t token = 0; token < kept_; ++token)
            for (int64_t c = 0; c < channels_; ++c) {
                double* first = sums_.data() + token * heads_ * channels_ + c;
                if (heads_to_ == 1)
                    for (int64_t h = 1; h < heads_; ++h) *first += first[h * channels_];
                for (int64_t h = 0; h < heads_to_; ++h)
                    to[(token * heads_to_ + h) * channels_ + c] = static_cast<A>(first[h * channels_]);
            }
    }

    TensorView to_;
    int64_t runs_, kept_, heads_, heads_to_, channels_;
    std::vector<double> sums_;
};

// The gate's gradient, [Tq | 1, H | 1, Dv | 1] or [B | 1, N | 1, H | 1, Dv | 1]: made in place where each query has a
// gate of its own, else as sums.
std::optional<Sums> prepare_gate(Call& call, const TensorView& grad, int64_t runs) {
    AttentionProblem& p = call.problem;
    const int64_t* n = grad.shape;
    const bool packed = call.packed();
    const bool rows_kept = packed ? n[0] == call.tokens() : n[0] == p.rows;
    const bool tokens_kept = packed ? rows_kept : n[1] == p.queries;
    const int64_t heads_to = n[grad.axes - 2];
    p.gate_channels = n[grad.axes - 1];
    if (rows_kept && tokens_kept && heads_to == p.heads) {
        const size_t size = grad.dtype == DType::float64 ? sizeof(double) : sizeof(float);
        if (grad.size() > 0) std::memset(grad.data, 0, static_cast<size_t>(grad.size()) * size);
        p.grad_gate = call.like_output(grad);
        return std::nullopt;
    }
    std::optional<Sums> sums(std::in_place, grad, rows_kept ? 1 : runs, packed ? n[0] : n[0] * n[1], p.heads);
    const int64_t token = p.heads * p.gate_channels;
    p.gate_summed = true;
    p.gate_run = rows_kept ? 0 : sums->run_size();
    p.grad_gate = {sums->data(), nullptr, 0, tokens_kept ? token : 0, p.gate_channels, 1, true};
    if (rows_kept && packed) p.grad_gate.begins = p.query_begins;
    if (rows_kept && !packed) p.grad_gate.row = n[1] * token;
    return sums;
}

}  // namespace

void attention_forward(const AttentionInputs& in, const AttentionOutputs& to, int64_t threads) {
    const Checks check("attention_forward");
    check_inputs(check, in);
    check_outputs(check, in, to);
    Call call(in);
    AttentionProblem& p = call.problem;
    p.out = call.like_output(to.out);
    want_huge_pages(to.out);
    if (to.attn_out) want_huge_pages(*to.attn_out);
    if (to.residual) p.residual = call.like_output(*to.residual);
    if (to.attn_out) p.attn_out = call.like_output(*to.attn_out);
    if (to.lse) p.lse = call.without_channels(*to.lse);
    if (call.packed()) {
        zero_gaps(call.queries(), to.out);
        if (to.attn_out) zero_gaps(call.queries(), *to.attn_out);
        if (to.lse && to.lse->dtype == DType::float64) blind_gaps<double>(call.queries(), *to.lse);
        if (to.lse && to.lse->dtype == DType::float32) blind_gaps<float>(call.queries(), *to.lse);
    }
    const Runs runs(p.rows, kMostRuns, [&](int64_t row) { return call.work(row); });
    const Kernels& native = kernels(in.k.dtype);
    threads = call.useful_threads(threads);
    run_tasks(call, runs, tasks_of(call, runs, threads, true), threads, native.attention_forward_memory(p),
              [&](const AttentionTask& task, void* memory) { native.attention_forward(p, task, memory); });
}

void attention_backward(const AttentionInputs& in, const AttentionGradients& grads, int64_t threads) {
    const Checks check("attention_backward");
    check_inputs(check, in);
    check_gradients(check, in, grads);
    Call call(in);
    AttentionProblem& p = call.problem;
    p.grad_out = call.like_output(grads.grad_out);
    if (grads.attn_out) p.attn_out = call.like_output(*grads.attn_out);
    p.grad_k = call.like_keys(grads.grad_k);
    want_huge_pages(grads.grad_k);
    zero_gaps(call.keys, grads.grad_k);
    if (grads.grad_v) {
        p.grad_v = call.like_keys(*grads.grad_v);
        want_huge_pages(*grads.grad_v);
        zero_gaps(call.keys, *grads.grad_v);
    }
    // Fewer runs where their sums would take more than a few MiB.
    const bool sums_over_rows = in.layout == QueryLayout::shared || in.gate;
    const int64_t of_a_run = std::max<int64_t>(1, p.queries) * p.heads * (p.head_size + p.value_size);
    const int64_t most_runs = std::clamp<int64_t>((int64_t{1} << 20) / of_a_run, 8, kMostRuns);
    const Runs runs(p.rows, sums_over_rows ? most_runs : kMostRuns, [&](int64_t row) { return call.work(row); });
    std::optional<Sums> query_sums, gate_sums;
    p.shared_queries = in.layout == QueryLayout::shared;
    if (p.shared_queries) {
        query_sums.emplace(grads.grad_q, runs.count(), p.queries, p.heads);
        p.grad_q = {query_sums->data(), nullptr, 0, p.heads * p.head_size, p.head_size, 1, true};
        p.query_run = query_sums->run_size();
    } else {
        p.grad_q = call.like_output(grads.grad_q);
        want_huge_pages(grads.grad_q);
        if (call.packed()) zero_gaps(call.queries(), grads.grad_q);
    }
    if (grads.grad_gate) gate_sums = prepare_gate(call, *grads.grad_gate, runs.count());
    const Kernels& native = kernels(in.k.dtype);
    threads = call.useful_threads(threads);
    // Parts of a row would add to the same sums over queries at once.
    std::vector<AttentionTask> tasks = tasks_of(call, runs, threads, !p.shared_queries && !p.gate_summed);
    RowSums divided(p, native, tasks);
    run_tasks(call, runs, tasks, threads, native.attention_backward_memory(p),
              [&](const AttentionTask& task, void* memory) {
                  native.attention_backward(p, task, memory);
                  if (task.part >= 0) divided.add(task, memory);
              });
    if (query_sums) query_sums->write();
    if (gate_sums) gate_sums->write();
}

}  // namespace interformer
