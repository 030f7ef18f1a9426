// Checks of the attention kernels' arguments, beyond those of every backend.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/attention.h"
#include "cuda/elements.h"
#include "cuda/tile_scheduler.cuh"

namespace interformer {
namespace cuda {

namespace {

int64_t query_tokens(const AttentionInputs& in) {
    const int64_t* q = in.q.shape;
    return in.layout == QueryLayout::packed ? q[0] : (in.kv_offsets.shape[0] - 1) * q[in.q.axes - 3];
}

void check_call(const Checks& check, const AttentionInputs& in) {
    check_inputs(check, in);
    check.contiguous_last_axis("q", in.q);
    for (const TensorView* x : {&in.k, in.v ? &*in.v : &in.k})
        if (x->shape[2] > kMaxChannels)
            throw std::runtime_error("the CUDA kernels of attention serve heads of at most " +
                                     std::to_string(kMaxChannels) + " channels, found " + describe(*x));
}

// The kernels rotate tiles of packed queries and of keys that are not values, four pairs at a time.
void check_rope(const Checks& check, const AttentionInputs& in, const RotatedInside& rotated) {
    if (!in.cos) {
        if (rotated.queries || rotated.keys) check.refuse("cos", "given with what is rotated inside", "None");
        return;
    }
    if (!in.v || in.skip_prefix != 0) check.refuse("cos", "None without v, and with skip_prefix", describe(*in.cos));
    if (std::max(in.k.shape[2], value_axis(in).size) > kWidestRope)
        check.refuse("cos", "None for heads of more than " + std::to_string(kWidestRope) + " channels",
                     describe(*in.cos));
    for (const TensorView* table : {&*in.cos, &*in.sin})
        if (table->shape[1] % 4 != 0 || alignment_of(*table) < 16)
            check.refuse("cos", "tables with rows of 4n numbers, aligned to 16 bytes", describe(*table));
    const int64_t row = in.cos->strides[0];
    if (in.cos->shape[0] > 1 && (row != in.sin->strides[0] || row < 0 || row > UINT32_MAX))
        check.refuse("sin", "of cos's strides", describe(*in.sin));
}

// A float32 tensor with a number for each query.
void check_per_query(const Checks& check, const AttentionInputs& in, const char* argument, bool wanted,
                     const std::optional<TensorView>& x) {
    check_pair(check, argument, wanted, x);
    if (!x) return;
    check_like_output(check, in, argument, *x, DType::float32, std::nullopt);
    check.contiguous(argument, *x);
}

// Partials have `channels`. The direction of the call decides whether partials and their statistics are needed.
void check_splits(const Checks& check, const AttentionInputs& in, const SplitKv& splits, Axis channels,
                  bool has_partials, bool has_stats) {
    const int64_t split_kv = splits.split_kv;
    check_pair(check, "partials", has_partials && split_kv != 0, splits.partials);
    check_pair(check, "partial_stats", has_stats && split_kv != 0, splits.partial_stats);
    if (split_kv == 0) return;
    if (split_kv < 0 || split_kv % 64 != 0 || in.layout == QueryLayout::packed)
        check.refuse("split_kv", "a multiple of 64, and 0 for packed queries", std::to_string(split_kv));
    const Axis room{"P", 2 * in.k.shape[0] / split_kv + 1}, n{"N", in.q.shape[in.q.axes - 3]},
        heads{"H", in.q.shape[in.q.axes - 2]};
    if (splits.partials) {
        check.tensor("partials", *splits.partials, DType::float32, {room, n, heads, channels});
        check.contiguous("partials", *splits.partials);
    }
    if (splits.partial_stats) {
        check.tensor("partial_stats", *splits.partial_stats, DType::float32, {room, n, heads, {"2", 2}});
        check.contiguous("partial_stats", *splits.partial_stats);
    }
}

void check_scheduler(const Checks& check, const TensorView& scheduler) {
    check.tensor("scheduler", scheduler, DType::int64, {{"S", kSchedulerSize}});
    check.contiguous("scheduler", scheduler);
}

// Sums of workers for the gradient of a table of so many entries; present where the table is.
void check_worker_sums(const Checks& check, const AttentionInputs& in, const char* argument,
                       const std::optional<TensorView>& sums, const std::optional<TensorView>& table, int64_t entries) {
    check_pair(check, argument, table.has_value(), sums);
    if (!sums) return;
    check.tensor(argument, *sums, DType::float32,
                 {{"workers"}, {"H", in.q.shape[in.q.axes - 2]}, {"entries", entries}});
    check.contiguous(argument, *sums);
    if (sums->shape[0] < 1) check.refuse(argument, "of at least one worker", describe(*sums));
}

void check_tables(const Checks& check, const AttentionInputs& in, const BackwardWorkspace& workspace) {
    const VariantTensors& tables = in.variant_tensors;
    const auto entries = [](const std::optional<TensorView>& table) { return table ? table->shape[1] : 0; };
    check_worker_sums(check, in, "sink_sums", workspace.sink_sums, tables.sinks, 1);
    check_worker_sums(check, in, "position_sums", workspace.position_sums, tables.position_bias,
                      entries(tables.position_bias));
    check_worker_sums(check, in, "time_sums", workspace.time_sums, tables.time_bias, entries(tables.time_bias));
    for (const auto* table : {&tables.position_bias, &tables.time_bias})
        if (*table && ((*table)->shape[1] > INT32_MAX / 2))
            check.refuse("position_bias", "of fewer entries", describe(**table));
}

void check_gate_gradient(const Checks& check, const AttentionInputs& in, const TensorView& grad, int64_t block) {
    check.contiguous("grad_gate", grad);
    const Axis last{"Dv or 1", grad.axes > 0 && grad.shape[grad.axes - 1] == 1 ? 1 : value_axis(in).size};
    if (block == 1) {
        const bool whole =
            grad.dtype == in.k.dtype && grad.axes > 0 && grad.shape[grad.axes - 1] == value_axis(in).size;
        return check_like_output(check, in, "grad_gate", grad, whole ? in.k.dtype : DType::float32, last);
    }
    if (block < 1) check.refuse("gate_block", "at least 1", std::to_string(block));
    const Axis blocks{"blocks", (query_tokens(in) + block - 1) / block}, heads{"H", in.q.shape[in.q.axes - 2]};
    if (in.layout == QueryLayout::packed)
        check.tensor("grad_gate", grad, DType::float32, {blocks, heads, last});
    else
        check.tensor("grad_gate", grad, DType::float32, {blocks, {"1", 1}, heads, last});
}

void check_query_gradient(const Checks& check, const AttentionInputs& in, const TensorView& grad, int64_t key_shards) {
    const bool is_shared = in.layout == QueryLayout::shared;
    if (key_shards < 1 || (key_shards > 1 && !is_shared))
        check.refuse("key_shards", "1, or more for shared queries", std::to_string(key_shards));
    if (!is_shared) return check.gradient("grad_q", grad, "q", in.q);
    const int64_t* q = in.q.shape;
    if (grad.shape[0] % key_shards != 0)
        check.refuse("grad_q", "row groups times " + std::to_string(key_shards) + " key shards", describe(grad));
    check.tensor("grad_q", grad, DType::float32, {{"row_groups * key_shards"}, {"M", q[0]}, {"H", q[1]}, {"D", q[2]}});
    check.contiguous("grad_q", grad);
}

}  // namespace

void check_forward(const Checks& check, const AttentionInputs& in, const AttentionOutputs& to,
                   const ForwardWorkspace& workspace) {
    check_call(check, in);
    check_rope(check, in, workspace.rotated);
    check_scheduler(check, workspace.scheduler);
    check_outputs(check, in, to);
    if (to.residual) check.contiguous_last_axis("residual", *to.residual);
    check_splits(check, in, workspace.splits, value_axis(in), true, true);
}

void check_backward(const Checks& check, const AttentionInputs& in, const AttentionGradients& grads,
                    const BackwardWorkspace& workspace) {
    check_call(check, in);
    check_rope(check, in, workspace.rotated);
    check_scheduler(check, workspace.scheduler);
    const DType dtype = in.k.dtype;
    const bool softmax = in.variant.score.softmax, gated = in.gate.has_value();
    check_like_output(check, in, "grad_out", grads.grad_out, dtype, value_axis(in));
    check.contiguous_last_axis("grad_out", grads.grad_out);
    check_query_gradient(check, in, grads.grad_q, workspace.key_shards);
    check_splits(check, in, workspace.splits, {"D", in.k.shape[2]}, in.layout != QueryLayout::shared, softmax);
    check_key_gradients(check, in, grads);
    check_tables(check, in, workspace);
    check_lse_gradient(check, in, grads);
    if (grads.grad_lse) check.contiguous("grad_lse", *grads.grad_lse);
    check_pair(check, "attn_out", gated, grads.attn_out);
    check_per_query(check, in, "lse", softmax, workspace.lse);
    check_per_query(check, in, "delta", softmax, workspace.delta);
    check_per_query(check, in, "inv_row_sum", softmax, workspace.inv_row_sum);
    check_pair(check, "grad_attn_out", gated || in.variant.post_scale != 1.0, workspace.grad_attn_out);
    if (workspace.grad_attn_out) {
        check_like_output(check, in, "grad_attn_out", *workspace.grad_attn_out, dtype, value_axis(in));
        check.contiguous("grad_attn_out", *workspace.grad_attn_out);
    }
    check_pair(check, "grad_gate", gated, grads.grad_gate);
    if (!gated) return;
    check_like_output(check, in, "attn_out", *grads.attn_out, DType::float32, value_axis(in));
    check.contiguous("attn_out", *grads.attn_out);
    check_gate_gradient(check, in, *grads.grad_gate, workspace.gate_block);
}

}  // namespace cuda
}  // namespace interformer
