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
#include "cpu/caches.h"
#include "cpu/gradient_sums.h"
#include "cpu/huge_pages.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/rotary_tables.h"
#include "cpu/rows.h"
#include "cpu/time_cells.h"

namespace interformer {

namespace {

// The problem of a call, and the rows that it points to.
class Call {
  public:
    AttentionProblem problem;

    explicit Call(const AttentionInputs& in)
        : keys_(in.kv_offsets, in.k.shape[0], in.skip_prefix),
          layout_(in.layout),
          dtype_(in.k.dtype),
          query_tokens_(in.q.shape[0]) {
        if (in.q_offsets) queries_.emplace(*in.q_offsets, in.q.shape[0]);
        AttentionProblem& p = problem;
        p.rows = keys_.count();
        p.heads = in.q.shape[in.q.axes - 2];
        p.kv_heads = in.k.shape[1];
        p.head_size = in.k.shape[2];
        p.value_size = (in.v ? *in.v : in.k).shape[2];
        p.key_begins = keys_.begins();
        p.key_counts = keys_.counts();
        if (layout_ == QueryLayout::packed) {
            p.query_begins = queries().begins();
            p.query_counts = queries().counts();
        } else {
            p.queries = in.q.shape[in.q.axes - 3];
        }
        p.max_queries = layout_ == QueryLayout::packed ? queries().longest() : p.queries;
        p.max_keys = keys_.longest();
        p.q = like_output(in.q);
        p.k = like_keys(in.k);
        p.v = like_keys(in.v ? *in.v : in.k);
        p.v_is_k = !in.v;
        if (in.gate) p.gate = like_output(*in.gate);
        set_options(in);
    }

    const Rows& keys() const { return keys_; }
    // Packed queries without offsets of their own have those of the keys.
    const Rows& queries() const { return queries_ ? *queries_ : keys_; }
    int64_t query_tokens() const { return query_tokens_; }
    bool packed() const { return layout_ == QueryLayout::packed; }
    DType dtype() const { return dtype_; }
    // Rows that overlap, by wrong offsets, write the same tokens, so one thread computes them all.
    int64_t useful_threads(int64_t threads) const {
        return keys_.ordered() && (!packed() || queries().ordered()) ? threads : 1;
    }

    RowTensor like_keys(const TensorView& x) const {
        return {x.data, problem.key_begins, 0, x.strides[0], x.strides[1], x.strides[2], true};
    }
    // A tensor with the layout of the queries and the output.
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

    // Queries of a row under one key/value head.
    int64_t queries_of(int64_t row) const {
        return (problem.query_counts ? problem.query_counts[row] : problem.queries) *
               (problem.heads / problem.kv_heads);
    }
    // An estimate of a row's work under one key/value head, in products of a query and a key.
    double work(int64_t row) const {
        const double queries = static_cast<double>(queries_of(row)), keys = problem.key_counts[row];
        constexpr double kOverhead = 16;  // cost of a token beside the products, in keys
        return queries * (keys + kOverhead) + keys * kOverhead + kOverhead;
    }

  private:
    void set_options(const AttentionInputs& in) {
        AttentionProblem& p = problem;
        p.variant = in.variant;
        if (in.cos) p.rope = rotary_tables(*in.cos, *in.sin, in.rope_interleaved);
        p.positions_q = positions_of(in.positions_q);
        p.positions_k = positions_of(in.positions_k);
        p.gating = in.gating;
        if (in.variant_tensors.num_targets) set_targets(*in.variant_tensors.num_targets);
        if (in.variant_tensors.sinks) p.sinks = in.variant_tensors.sinks->data;
        const VariantTensors& tensors = in.variant_tensors;
        set_bias(tensors.position_bias, p.position_bias);
        set_bias(tensors.time_bias, p.time_bias);
        if (tensors.time_bias) {
            p.times_q = static_cast<const int64_t*>(tensors.times_q->data);
            p.times_k = static_cast<const int64_t*>(tensors.times_k->data);
            time_cells_ = TimeCells(static_cast<const int64_t*>(tensors.time_edges->data), p.time_bias.entries - 1);
            p.time_edges = {time_cells_.edges(), time_cells_.first_bins(), time_cells_.bits(), time_cells_.steps(),
                            time_cells_.halves()};
        }
        p.adjusts_scores = in.variant.softcap > 0 || tensors.sinks || tensors.position_bias || tensors.time_bias;
        set_dropout(in);
    }
    static void set_bias(const std::optional<TensorView>& table, BiasTable& bias) {
        if (table) bias = {table->data, table->shape[0] == 1 ? 0 : table->strides[0], table->shape[1]};
    }
    void set_dropout(const AttentionInputs& in) {
        AttentionProblem& p = problem;
        p.weight_scale = in.variant.post_scale;
        p.dropout.all = in.variant.dropout_p == 1;
        p.dropout.some = in.variant.drops();
        if (!p.dropout.some) return;
        const auto seed = static_cast<uint64_t>(*static_cast<const int64_t*>(in.variant_tensors.dropout_seed->data));
        p.dropout.seed[0] = static_cast<uint32_t>(seed);
        p.dropout.seed[1] = static_cast<uint32_t>(seed >> 32);
        p.dropout.below = static_cast<uint32_t>(in.variant.dropout_p * 0x1p32);
        p.dropout.skipped = in.skip_prefix;
        p.dropout.factor = 1 / (1 - in.variant.dropout_p);
        p.weight_scale *= p.dropout.factor;
    }
    void set_targets(const TensorView& counts) {
        const auto* narrow = static_cast<const int32_t*>(counts.data);
        const auto* wide = static_cast<const int64_t*>(counts.data);
        for (int64_t row = 0; row < problem.rows; ++row) {
            const int64_t most = std::min(problem.query_counts[row], problem.key_counts[row]);
            const int64_t count = counts.dtype == DType::int32 ? narrow[row] : wide[row];
            targets_.push_back(std::clamp<int64_t>(count, 0, most));
        }
        problem.target_counts = targets_.data();
    }

    Rows keys_;
    std::optional<Rows> queries_;
    std::vector<int64_t> targets_;
    TimeCells time_cells_;
    QueryLayout layout_;
    DType dtype_;
    int64_t query_tokens_;  // packed queries, including the tail
};

int64_t bytes_of(const TensorView& x) {
    return x.size() * x.raw_type.bits / 8;
}

// Queries that no row holds see no key, so their log-sum-exp is -inf.
template <typename A>
void fill_lse_gaps(const Rows& rows, const TensorView& lse) {
    rows.for_gaps([&](int64_t begin, int64_t end) {
        std::fill_n(static_cast<A*>(lse.data) + begin * lse.shape[1], (end - begin) * lse.shape[1],
                    -std::numeric_limits<A>::infinity());
    });
}

// The tasks for threads. A row group under all heads, which lie side by side in memory, is one task. The heads of a
// heavy group become tasks of their own, and so do shards of a row with too much work for one thread. Heads of rows of
// few queries, which are read together, and heads that share bins of times, only where threads would be idle. No choice
// made here changes a result's bits.
std::vector<AttentionTask> make_tasks(const Call& call, const RowGroups& groups, int64_t threads, bool may_shard) {
    constexpr double kHeavy = 1.0 / 64;
    const AttentionProblem& p = call.problem;
    const double heavy_share = std::max(kHeavy, 0.25 / static_cast<double>(threads));
    const double half_a_thread = groups.total() * static_cast<double>(p.kv_heads) / static_cast<double>(2 * threads);
    std::vector<AttentionTask> tasks;
    for (int64_t i = 0; i < groups.count(); ++i) {
        const int64_t group = groups.scheduled(i), first = groups.bound(group), last = groups.bound(group + 1);
        const bool heavy = groups.work(group) > heavy_share * groups.total();
        const bool sharded = may_shard && threads > 1 && last - first == 1 && groups.work(group) > half_a_thread;
        const int64_t shards = sharded ? kernels(call.dtype()).attention_shards(p, first) : 1;
        for (int64_t head = 0, heads = heavy ? 1 : p.kv_heads; head < p.kv_heads; head += heads)
            for (int64_t shard = 0; shard < shards; ++shard)
                tasks.push_back({first, last, head, head + heads, shards > 1 ? shard : -1});
    }
    return tasks;
}

// Calls `kernel(task, memory)` for every task, on as many threads as are worth waking.
template <typename Kernel>
void run_tasks(const Call& call, const RowGroups& groups, const std::vector<AttentionTask>& tasks, int64_t threads,
               int64_t bytes, Kernel&& kernel) {
    const AttentionProblem& p = call.problem;
    const int64_t count = static_cast<int64_t>(tasks.size());
    const double multiply_adds = groups.total() * static_cast<double>(p.kv_heads * (p.head_size + p.value_size));
    const int active = worthwhile_threads(threads, count, static_cast<int64_t>(multiply_adds));
    ThreadMemory memory(active, bytes);
    parallel_for(active, count, [&](int64_t i, int thread) { kernel(tasks[i], memory.for_thread(thread)); });
}

// The gradients of the keys of sharded rows: one sum for each row and key/value head. Each thread adds its shard once
// the earlier shards are in, so that a thread keeps one shard at a time, however many a row has, and the order of a sum
// does not depend on the threads. Shards start in order, so an earlier shard is always finished or running, and the
// wait ends.
class ShardedKeyGradients {
  public:
    // Assigns the sums to the tasks.
    ShardedKeyGradients(const AttentionProblem& problem, const Kernels& kernels, std::vector<AttentionTask>& tasks)
        : p_(problem), kernels_(kernels) {
        for (AttentionTask& task : tasks) {
            if (task.shard < 0) continue;
            if (task.shard == 0) {
                sums_.emplace_back(new char[kernels_.attention_key_grads_bytes(p_, task.first_row)]);
                next_shard_.push_back(0);
            }
            task.key_grads = sums_.back().get();
            task.sharded_row = static_cast<int64_t>(sums_.size()) - 1;
        }
    }

    // Adds the gradients that the backward of a shard left in a thread's memory, once all earlier shards are in.
    void add(const AttentionTask& task, void* memory) {
        int64_t& next = next_shard_[task.sharded_row];
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [&] { return next == task.shard; });
        lock.unlock();
        kernels_.attention_add_shard(p_, task, memory);
        lock.lock();
        ++next;
        changed_.notify_all();
    }

  private:
    const AttentionProblem& p_;
    const Kernels& kernels_;
    std::vector<std::unique_ptr<char[]>> sums_;
    std::vector<int64_t> next_shard_;  // for each sharded row
    std::mutex mutex_;
    std::condition_variable changed_;
};

// ---------------------------------------------------------------- sums of the backward

// Prepares the gate's gradient, [Tq | 1, H | 1, Dv | 1] or [B | 1, N | 1, H | 1, Dv | 1]: in place where each query has
// a gate of its own, else as sums, which are returned.
std::optional<GradientSums> prepare_gate(Call& call, const TensorView& grad, int64_t groups) {
    AttentionProblem& p = call.problem;
    const int64_t* n = grad.shape;
    const bool packed = call.packed();
    const bool rows_kept = packed ? n[0] == call.query_tokens() : n[0] == p.rows;
    const bool tokens_kept = packed ? rows_kept : n[1] == p.queries;
    const int64_t heads_to = n[grad.axes - 2];
    p.gate_channels = n[grad.axes - 1];
    if (rows_kept && tokens_kept && heads_to == p.heads) {
        const size_t size = grad.dtype == DType::float64 ? sizeof(double) : sizeof(float);
        if (grad.size() > 0) std::memset(grad.data, 0, static_cast<size_t>(grad.size()) * size);
        p.grad_gate = call.like_output(grad);
        return std::nullopt;
    }
    const int64_t kept_tokens = packed ? n[0] : n[0] * n[1];
    std::optional<GradientSums> sums(std::in_place, grad, rows_kept ? 1 : groups, kept_tokens, p.heads);
    const int64_t token_stride = p.heads * p.gate_channels;
    p.gate_summed = true;
    p.grad_gate_group_stride = rows_kept ? 0 : sums->group_stride();
    p.grad_gate = {sums->data(), nullptr, 0, tokens_kept ? token_stride : 0, p.gate_channels, 1, true};
    if (rows_kept && packed) p.grad_gate.begins = p.query_begins;
    if (rows_kept && !packed) p.grad_gate.row = n[1] * token_stride;
    return sums;
}

// Prepares the gradients of the variant's tables, [Hb, entries]: sums over all rows, by head.
std::optional<GradientSums> prepare_table(const std::optional<TensorView>& grad, int64_t groups, int64_t heads,
                                          double*& sums_by_group) {
    if (!grad) return std::nullopt;
    TensorView by_head = *grad;
    if (grad->axes == 1) by_head.shape[1] = 1;
    by_head.axes = 2;
    std::optional<GradientSums> sums(std::in_place, by_head, groups, 1, heads);
    sums_by_group = sums->data();
    return sums;
}

// The row groups of the backward: fewer where the sums kept for each group would take more than a few MiB.
RowGroups backward_groups(const Call& call, bool sums_over_rows, int64_t table_entries) {
    constexpr int64_t kMaxSums = 1 << 20, kMinGroups = 8;
    const AttentionProblem& p = call.problem;
    const int64_t sums_per_group =
        std::max<int64_t>(1, p.queries) * p.heads * (p.head_size + p.value_size) + p.heads * table_entries;
    const int64_t max_groups = std::clamp<int64_t>(kMaxSums / sums_per_group, kMinGroups, kMaxRowGroups);
    return RowGroups(p.rows, sums_over_rows ? max_groups : kMaxRowGroups, [&](int64_t row) { return call.work(row); });
}

}  // namespace

void attention_forward(const AttentionInputs& in, const AttentionOutputs& outputs, int64_t threads) {
    const Checks check("attention_forward");
    check_inputs(check, in);
    check_outputs(check, in, outputs);
    Call call(in);
    AttentionProblem& p = call.problem;
    p.out = call.like_output(outputs.out);
    advise_huge_pages(outputs.out);
    if (outputs.attn_out) advise_huge_pages(*outputs.attn_out);
    if (outputs.residual) p.residual = call.like_output(*outputs.residual);
    if (outputs.attn_out) p.attn_out = call.like_output(*outputs.attn_out);
    if (outputs.lse) p.lse = call.without_channels(*outputs.lse);
    if (call.packed()) {
        zero_gaps(call.queries(), outputs.out);
        if (outputs.attn_out) zero_gaps(call.queries(), *outputs.attn_out);
        if (outputs.lse && outputs.lse->dtype == DType::float64) fill_lse_gaps<double>(call.queries(), *outputs.lse);
        if (outputs.lse && outputs.lse->dtype == DType::float32) fill_lse_gaps<float>(call.queries(), *outputs.lse);
    }
    const RowGroups groups(p.rows, kMaxRowGroups, [&](int64_t row) { return call.work(row); });
    const Kernels& native = kernels(in.k.dtype);
    threads = call.useful_threads(threads);
    run_tasks(call, groups, make_tasks(call, groups, threads, true), threads, native.attention_forward_memory(p),
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
    if (grads.grad_lse) p.grad_lse = call.without_channels(*grads.grad_lse);
    p.grad_k = call.like_keys(grads.grad_k);
    advise_huge_pages(grads.grad_k);
    zero_gaps(call.keys(), grads.grad_k);
    if (grads.grad_v) {
        p.grad_v = call.like_keys(*grads.grad_v);
        advise_huge_pages(*grads.grad_v);
        zero_gaps(call.keys(), *grads.grad_v);
    }
    p.stream_key_grads = exceed_caches(bytes_of(grads.grad_k) + (grads.grad_v ? bytes_of(*grads.grad_v) : 0));
    p.shared_queries = in.layout == QueryLayout::shared;
    const bool has_tables = p.sinks || p.position_bias.table || p.time_bias.table;
    const int64_t table_entries = p.position_bias.entries + p.time_bias.entries + 1;
    const RowGroups groups = backward_groups(call, p.shared_queries || in.gate || has_tables, table_entries);
    const std::vector<int64_t> row_groups = groups.by_row();
    p.row_groups = row_groups.data();
    std::optional<GradientSums> query_sums, gate_sums;
    if (p.shared_queries) {
        query_sums.emplace(grads.grad_q, groups.count(), p.queries, p.heads);
        p.grad_q = {query_sums->data(), nullptr, 0, p.heads * p.head_size, p.head_size, 1, true};
        p.grad_q_group_stride = query_sums->group_stride();
    } else {
        p.grad_q = call.like_output(grads.grad_q);
        advise_huge_pages(grads.grad_q);
        if (call.packed()) zero_gaps(call.queries(), grads.grad_q);
    }
    std::optional<GradientSums> table_sums[] = {
        prepare_table(grads.variant.sinks, groups.count(), p.heads, p.grad_sinks),
        prepare_table(grads.variant.position_bias, groups.count(), p.heads, p.position_bias.grads),
        prepare_table(grads.variant.time_bias, groups.count(), p.heads, p.time_bias.grads)};
    if (grads.grad_gate) gate_sums = prepare_gate(call, *grads.grad_gate, groups.count());
    const Kernels& native = kernels(in.k.dtype);
    threads = call.useful_threads(threads);
    // Shards of a row would add to the same sums over queries at the same time.
    const bool may_shard = !p.shared_queries && !p.gate_summed && !has_tables;
    std::vector<AttentionTask> tasks = make_tasks(call, groups, threads, may_shard);
    ShardedKeyGradients sharded(p, native, tasks);
    run_tasks(call, groups, tasks, threads, native.attention_backward_memory(p),
              [&](const AttentionTask& task, void* memory) {
                  native.attention_backward(p, task, memory);
                  if (task.shard >= 0) sharded.add(task, memory);
              });
    if (query_sums) query_sums->write();
    if (gate_sums) gate_sums->write();
    for (std::optional<GradientSums>& sums : table_sums)
        if (sums) sums->write();
}

}  // namespace interformer
