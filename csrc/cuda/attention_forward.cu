// Forward of the attention kernels: an online softmax, or a plain sum, over the keys of a row or of one split of them.
#include <cstdint>

#include "cuda/attention.h"
#include "cuda/attention_output.cuh"
#include "cuda/attention_plan.cuh"
#include "cuda/attention_split_kv.cuh"

namespace interformer {
namespace cuda {

namespace {

template <typename T>
struct ForwardArguments {
    AttentionProblem<T> problem;
    Epilogue<T> epilogue;
    Partials partials;
    Plan plan;
};

template <typename T>
__host__ __device__ Contents contents_of(const AttentionProblem<T>& p) {
    return {false, !p.variant.kind.softmax, false};
}

// Products of a tile of keys become probabilities; accumulators so far are to be multiplied by `alpha`.
template <typename T, int N>
__device__ void map_scores(const AttentionProblem<T>& p, AccTile (&s)[N], const LaneQueries<Query>& queries, int first,
                           float prob_scale, float2* scratch, OnlineSoftmax& softmax, float (&alpha)[2]) {
    const ScoresByQuery<Query> at = queries.scores(first);
    if (p.variant.kind.softmax) return online_softmax_update(p.variant, s, prob_scale, softmax, alpha, at);
    scores_to_probs(p.variant, s, scratch, at);
    alpha[0] = alpha[1] = 1.0f;
}

// Writes a warp's results, query by query: outputs, or the partial of a split.
template <typename T, int WIDTH>
__device__ void write_results(const ForwardArguments<T>& f, const Task& task, const PackedRows& rows,
                              const AttentionMemory<T, WIDTH>& memory, const OnlineSoftmax& softmax) {
    const AttentionProblem<T>& p = f.problem;
    const float row_sum[2] = {quad_sum(softmax.row_sum[0]), quad_sum(softmax.row_sum[1])};
    const float prob_scale = prob_scale_for<T>(task.keys.count);
#pragma unroll 1
    for (int r = 0; r < kStationary; ++r) {
        const PackedRow query = rows[r];
        const int lane = r % 8 * 4;
        RowStats stats{__shfl_sync(kAllLanes, r < 8 ? softmax.row_max[0] : softmax.row_max[1], lane),
                       __shfl_sync(kAllLanes, r < 8 ? row_sum[0] : row_sum[1], lane), prob_scale};
        if (query.token >= task.queries.count) break;
        const float* staged = memory.staged + r * AttentionTiles<T, WIDTH>::kStaged;
        if (task.partial < 0) {
            const OutputPlace at(task.queries, query, p.heads, task.queries.row < p.kv_offsets.rows);
            const KeyRange range = p.variant.masks.key_range(query.token, task.queries.count, task.keys.count);
            if (p.variant.kind.softmax && !range.fully_masked()) stats.nan_if_zero();
            write_output(f.epilogue, at, p.value_channels, stats, [&](int c) { return staged[c]; });
            continue;
        }
        const int64_t at = (task.partial * p.queries + query.token) * p.heads + query.head;
        for (int c = lane_index(); c < p.value_channels; c += kWarp)
            f.partials.sums[at * p.value_channels + c] = staged[c];
        if (lane_index() == 0) {
            f.partials.stats[2 * at] = stats.row_max;
            f.partials.stats[2 * at + 1] = stats.row_sum;
        }
    }
}

// 16 queries for each warp, over the keys of their row or one split of them.
template <typename T, int WIDTH>
__device__ void attend_tile(const ForwardArguments<T>& f, const TileGroup& group) {
    using Tiles = AttentionTiles<T, WIDTH>;
    const AttentionProblem<T>& p = f.problem;
    const int kv_head = group.index_in_slot();
    const Task task = task_of(p, f.partials, group);
    if (task.idle) return;
    const Keys keys = task.keys;

    const PackedRows group_rows(task.begin, kv_head, p.q_per_kv);
    const PackedRows rows(task.begin + group.warp * kStationary, kv_head, p.q_per_kv);
    const TileRange tiles = task.key_tiles(p, group_rows, group.rows(), Tiles::kStreamed, f.partials.split_kv);
    const TileRange warp_tiles = task.key_tiles(p, rows, kStationary, Tiles::kStreamed, f.partials.split_kv);

    const SharedLayout layout = SharedLayout::of<T, WIDTH>(group.warps, f.plan.stages, contents_of(p));
    const AttentionMemory<T, WIDTH> memory(group, layout);
    cp_async_stationary(memory.stationary[0], p.q, p.channels, task.queries, rows);
    cp_async_commit();
    const LaneQueries<Query> queries(
        rows, [&](const PackedRow& row) { return p.variant.query(row, task.queries.count, keys.count); });

    AccTile acc[WIDTH / 16];
    OnlineSoftmax softmax;
    const float prob_scale = prob_scale_for<T>(keys.count);
    for_each_tile(
        group, tiles, f.plan.stages,
        [&](int tile, int stage) { cp_async_keys(p, memory, group.threads, keys, kv_head, tile, stage); },
        [&](int tile, int stage) {
            if (!warp_tiles.contains(tile)) return;
            typename Tiles::Scores s;
            float alpha[2];
            multiply_rows(s, memory.stationary[0], memory.streamed[2 * stage], p.channels);
            map_scores(p, s, queries, tile * Tiles::kStreamed, prob_scale, memory.scratch, softmax, alpha);
            for_each(acc, [&](int half, int, float& x) { x *= alpha[half]; });
            multiply_accumulate(acc, s, memory.streamed[2 * stage + (p.v_is_k ? 0 : 1)], 0);
        });
    cp_async_wait<0>();
    group.sync();
    stage_results(memory, acc, p.outer_scale);
    __syncwarp();
    write_results(f, task, rows, memory, softmax);
}

template <typename T, int WIDTH>
__global__ void __launch_bounds__(kMaxWarps* kWarp, blocks_for<T>(WIDTH))
    attend(const __grid_constant__ ForwardArguments<T> f) {
    for_each_item<kPersistent<T, WIDTH>>(f.plan, [&](const TileGroup& group) { attend_tile<T, WIDTH>(f, group); });
}

// ---------------------------------------------------------------- split rows

// Combines the partials of split rows, one query under one head for each warp.
template <typename T>
__global__ void __launch_bounds__(kMaxWarps* kWarp) combine_partials(const __grid_constant__ ForwardArguments<T> f) {
    const AttentionProblem<T>& p = f.problem;
    const int64_t number = int64_t{blockIdx.x} * kMaxWarps + threadIdx.x / kWarp;
    const CombineItem item = combine_item_of(p, f.partials, number);
    if (item.num_splits == 0) return;
    const bool softmax = p.variant.kind.softmax;
    const float* partial_stats = f.partials.stats;
    RowStats stats{-INFINITY, 0.0f, prob_scale_for<T>(item.keys)};
    if (softmax)
        for (int i = 0; i < item.num_splits; ++i) stats.row_max = fmaxf(stats.row_max, partial_stats[2 * item.at(i)]);
    const float base = stats.row_max == -INFINITY ? 0.0f : stats.row_max;
    const auto alpha = [&](int split) {
        return softmax ? exp2f((partial_stats[2 * item.at(split)] - base) * kLog2E) : 1.0f;
    };
    if (softmax)
        for (int i = 0; i < item.num_splits; ++i) stats.row_sum += partial_stats[2 * item.at(i) + 1] * alpha(i);
    if (softmax) stats.nan_if_zero();
    const PackedRow query{item.query / p.heads, item.query % p.heads};
    write_output(f.epilogue, OutputPlace(p.queries_of(item.row), query, p.heads, true), p.value_channels, stats,
                 [&](int c) {
                     float sum = 0.0f;
                     for (int i = 0; i < item.num_splits; ++i)
                         sum += f.partials.sums[item.at(i) * p.value_channels + c] * alpha(i);
                     return sum;
                 });
}

// ---------------------------------------------------------------- launches

template <typename T, int WIDTH>
void start_attend(ForwardArguments<T>& f, const TensorView& scheduler, const Stream& stream) {
    const AttentionProblem<T>& p = f.problem;
    f.plan = plan_of<T, WIDTH>({p.mean_packed_rows(), p.mean_keys(), contents_of(p)});
    f.plan.slots = slots_of(p, f.partials, p.rows(), f.plan.rows());
    f.plan.items_per_slot = p.kv_heads;
    start_query_groups<kPersistent<T, WIDTH>>(attend<T, WIDTH>, f, scheduler, stream);
}

template <typename T>
Epilogue<T> epilogue_of(const AttentionInputs& in, const AttentionOutputs& to) {
    Epilogue<T> epilogue{};
    epilogue.gating = in.gating;
    if (in.gate) epilogue.gate = Heads<const T>(*in.gate);
    if (to.residual) epilogue.residual = Heads<const T>(*to.residual);
    epilogue.out = static_cast<T*>(to.out.data);
    if (to.attn_out) epilogue.attn_out = static_cast<float*>(to.attn_out->data);
    if (to.lse) epilogue.lse = static_cast<float*>(to.lse->data);
    return epilogue;
}

}  // namespace

void attention_forward(const AttentionInputs& in, const AttentionOutputs& to, const ForwardWorkspace& workspace,
                       bool tf32, const Stream& stream) {
    check_forward(stream.checks(), in, to, workspace);
    if (to.out.size() == 0) return;
    with_element(in.k.dtype, tf32, [&](auto element) {
        using T = decltype(element);
        ForwardArguments<T> f{AttentionProblem<T>(in), epilogue_of<T>(in, to), Partials(workspace.splits), {}};
        with_width(in, [&](auto width) { start_attend<T, width.value>(f, workspace.scheduler, stream); });
        start_combine(combine_partials<T>, f, stream);
    });
}

}  // namespace cuda
}  // namespace interformer
