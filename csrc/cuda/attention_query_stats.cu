// The first pass of the backward under softmax: delta less dlse, and inverse row sum of every query, from sums of P and
// of P * dP over its keys.
#include <cstdint>

#include "cuda/attention_gradient.cuh"
#include "cuda/attention_output.cuh"
#include "cuda/attention_plan.cuh"
#include "cuda/attention_split_kv.cuh"

namespace interformer {
namespace cuda {

namespace {

template <typename T>
struct StatsArguments : BackwardArguments<T> {
    const float* grad_lse = nullptr;  // of each query, as `lse`; null: zeros
    Partials partials;

    explicit StatsArguments(const Backward& call) : BackwardArguments<T>(call), partials(call.workspace.splits) {
        if (call.grads.grad_lse) grad_lse = static_cast<const float*>(call.grads.grad_lse->data);
    }
};

template <typename T>
__host__ __device__ Contents contents_of(const AttentionProblem<T>& p) {
    return {true, p.maps_in_memory(), false, p.options.any};
}

// Sums of P and of P * dP for a lane's two rows, over its columns. P is times `prob_scale_for`, as in the forward, so
// that sums over gradients are finite where these are.
struct StatsSums {
    float probs[2] = {}, products[2] = {};
};

template <typename T>
__device__ void write_stats(const StatsArguments<T>& g, int64_t place, int head, int keys, bool in_row, float probs,
                            float products) {
    const AttentionProblem<T>& p = g.problem;
    const float prob_scale = prob_scale_for<T>(keys);
    if (p.sinks != nullptr && in_row) probs += prob_scale * sink_prob(p.sinks[head], g.lse[place]);
    const float divisor = probs == 0.0f ? 1.0f : probs;
    float delta = products / divisor;
    // Queries of the tail are not read. The factor of gradients of scores has dropout's, which is not dlse's.
    if (g.grad_lse != nullptr && in_row) delta -= g.grad_lse[place] * p.options.dropout.inverse;
    g.delta[place] = delta;
    g.inv_row_sum[place] = prob_scale / divisor;
}

template <typename T>
__device__ void write_sums(const StatsArguments<T>& g, const Task& task, const PackedRows& rows,
                           const StatsSums& sums) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float probs = quad_sum(sums.probs[half]), products = quad_sum(sums.products[half]);
        const PackedRow query = rows[lane_index() / 4 + half * 8];
        if (lane_index() % 4 != 0 || query.token >= task.queries.count) continue;
        if (task.partial < 0) {
            const bool in_row = task.queries.row < g.problem.kv_offsets.rows;
            write_stats(g, g.place(task.queries, query), query.head, task.keys.count, in_row, probs, products);
            continue;
        }
        const int64_t at = (task.partial * g.problem.queries + query.token) * g.problem.heads + query.head;
        g.partials.stats[2 * at] = probs;
        g.partials.stats[2 * at + 1] = products;
    }
}

// 16 queries for each warp, over the keys of their row or one split of them.
template <typename T, int WIDTH, bool OPTIONS>
__device__ void sum_tile(const StatsArguments<T>& g, const TileGroup& group) {
    using Tiles = AttentionTiles<T, WIDTH>;
    const AttentionProblem<T>& p = g.problem;
    const int kv_head = group.index_in_slot();
    const Task task = task_of(p, g.partials, group);
    if (task.idle) return;
    const Keys keys = task.keys;
    const PackedRows group_rows(task.begin, kv_head, p.q_per_kv);
    const PackedRows rows(task.begin + group.warp * kStationary, kv_head, p.q_per_kv);
    const auto masks = task.template masks<OPTIONS>(p);
    const auto tiles = task.key_tiles(masks, group_rows, group.rows(), Tiles::kStreamed, g.partials.split_kv);
    const auto warp_tiles = task.key_tiles(masks, rows, kStationary, Tiles::kStreamed, g.partials.split_kv);

    const SharedLayout layout = SharedLayout::of<T, WIDTH>(group.warps, g.plan.stages, contents_of(p));
    const AttentionMemory<T, WIDTH> memory(group, layout);
    load_queries_and_grads(memory, g, task.queries, rows);
    using OneQuery = QueryStats<KeysOf<OPTIONS>>;
    const LaneQueries<OneQuery> queries(rows, common_range<T>(masks, rows), [&](const PackedRow& row) {
        OneQuery stats{{masks.key_range(row.token)}, 0.0f, 0.0f, prob_scale_for<T>(keys.count)};
        if (row.token < task.queries.count) stats.lse = g.lse[g.place(task.queries, row)];
        return stats;
    });

    StatsSums sums;
    for_each_key_tile(p, group, memory, g.plan.stages, tiles, warp_tiles, keys, kv_head, queries,
                      [&](typename Tiles::Scores& s, typename Tiles::Scores& d, const auto& at, int, int) {
                          // With a delta of 0, the gradients of the scores are P * dP.
                          softmax_scores_backward(p, s, d, memory.scratch, places_of(at, rows, masks));
                          for_each_pair(s, d, [&](int half, int, float& prob, float& product) {
                              sums.probs[half] += prob;
                              sums.products[half] += product;
                          });
                      });
    cp_async_wait<0>();
    write_sums(g, task, rows, sums);
}

template <typename T, int WIDTH>
__global__ void __launch_bounds__(kMaxWarps* kWarp, query_blocks_for<T>(WIDTH))
    sum_query_stats(const __grid_constant__ StatsArguments<T> g) {
    for_each_item<kPersistent<T, WIDTH>>(g.plan, [&](const TileGroup& group) { sum_tile<T, WIDTH, false>(g, group); });
}
template <typename T, int WIDTH>
__global__ void __launch_bounds__(kMaxWarps* kWarp, kOptionBlocks)
    sum_query_stats_with_options(const __grid_constant__ StatsArguments<T> g) {
    for_each_item<kPersistent<T, WIDTH>>(g.plan, [&](const TileGroup& group) { sum_tile<T, WIDTH, true>(g, group); });
}

// Combines the partials of split rows, one query under one head for each warp.
template <typename T>
__global__ void __launch_bounds__(kMaxWarps* kWarp) combine_partials(const __grid_constant__ StatsArguments<T> g) {
    const int64_t number = int64_t{blockIdx.x} * kMaxWarps + threadIdx.x / kWarp;
    const CombineItem item = combine_item_of(g.problem, g.partials, number);
    if (item.num_splits == 0 || lane_index() != 0) return;
    float probs = 0.0f, products = 0.0f;
    for (int i = 0; i < item.num_splits; ++i) {
        probs += g.partials.stats[2 * item.at(i)];
        products += g.partials.stats[2 * item.at(i) + 1];
    }
    const int head = item.query % g.problem.heads;
    write_stats(g, item.row * item.queries + item.query, head, item.keys, true, probs, products);
}

}  // namespace

void query_stats_backward(const Backward& call) {
    if (!call.in.variant.score.softmax || call.in.q.size() == 0) return;
    with_element(call.in.k.dtype, call.tf32, [&](auto element) {
        using T = decltype(element);
        StatsArguments<T> g(call);
        const AttentionProblem<T>& p = g.problem;
        with_width(call.in, p.options, [&](auto width) {
            constexpr int kWidth = width.value;
            g.plan = plan_of<T, kWidth>({p.mean_packed_rows(), p.mean_keys(), contents_of(p)});
            g.plan.slots = slots_of(p, g.partials, p.rows(), g.plan.rows());
            g.plan.items_per_slot = p.kv_heads;
            void (*kernel)(StatsArguments<T>) = sum_query_stats<T, kWidth>;
            if constexpr (kServesOptions<kWidth>)
                if (p.options.any) kernel = sum_query_stats_with_options<T, kWidth>;
            start_query_groups<kPersistent<T, kWidth>>(kernel, g, call.workspace.scheduler, call.stream);
        });
        start_combine(combine_partials<T>, g, call.stream);
    });
}

}  // namespace cuda
}  // namespace interformer
