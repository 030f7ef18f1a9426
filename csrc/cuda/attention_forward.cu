// Forward of the attention kernels: an online softmax, or a plain sum, over the keys of a row or of one split of them.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/attention.h"
#include "cuda/attention_option_scores.cuh"
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

// Whether addresses of copies stay in registers. Exact float32 and compute capability 10.0 would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <typename T>
constexpr bool kKeepsAddresses = false;
#else
template <typename T>
constexpr bool kKeepsAddresses = sizeof(T) == 2;
#endif

template <typename T>
__host__ __device__ Contents contents_of(const AttentionProblem<T>& p) {
    return {false, p.maps_in_memory(), false, p.options.any};
}

// Channels for which a warp holds accumulators. Options take registers that the widest heads lack: there an item is a
// half of the channels.
template <int WIDTH, bool OPTIONS>
constexpr int kChannelChunk = OPTIONS ? std::min(WIDTH, 128) : WIDTH;

// Products of a tile of keys become probabilities; accumulators so far are to be multiplied by `alpha`.
template <typename T, int N, typename Places>
__device__ void map_scores(const AttentionProblem<T>& p, AccTile (&s)[N], const Places& at, float prob_scale,
                           float2* scratch, OnlineSoftmax& softmax, float (&alpha)[2]) {
    if (p.variant.kind.softmax) {
        order_scores(p, s, scratch, at);
        online_softmax_update(p.variant, s, prob_scale, softmax, alpha, at);
        drop_probs(p, s, scratch, at);
        return;
    }
    pointwise_probs(p, s, scratch, at);
    alpha[0] = alpha[1] = 1.0f;
}

// One more tile of keys, or its first part, into a warp's accumulators: 16 N keys from `first` on.
template <int N, typename T, int WIDTH, typename Places, int C>
__device__ void attend_keys(const AttentionProblem<T>& p, const AttentionMemory<T, WIDTH>& memory, int stage,
                            const Places& at, float prob_scale, OnlineSoftmax& softmax, AccTile (&acc)[C],
                            int first_channel) {
    AccTile s[N];
    float alpha[2];
    multiply_rows(s, memory.stationary[0], memory.streamed[2 * stage], 0, p.channels);
    map_scores(p, s, at, prob_scale, memory.scratch, softmax, alpha);
    for_each(acc, [&](int half, int, float& x) { x *= alpha[half]; });
    multiply_accumulate(acc, s, memory.streamed[2 * stage + (p.v_is_k ? 0 : 1)], 0, first_channel);
}

// Negates a warp's stationary tile of 16-bit numbers, once its copies have landed.
template <typename Stationary>
__device__ void negate(Stationary tile) {
    cp_async_wait<0>();
    __syncwarp();
    uint32_t* pairs = reinterpret_cast<uint32_t*>(tile.data);
    for (int i = lane_index(); i < Stationary::kBytes / 4; i += kWarp) pairs[i] ^= 0x80008000u;
    __syncwarp();
}

// Statistics of a warp's queries, behind the channels of their staged results.
template <typename T, int WIDTH>
__device__ float* staged_stats(const AttentionMemory<T, WIDTH>& memory, int row) {
    return memory.staged + row * AttentionTiles<T, WIDTH>::kStaged + WIDTH;
}

// Writes a warp's results, several queries at once: outputs, or the partial of a split.
template <int CHUNK, typename T, int WIDTH, typename RowMasks>
__device__ void write_results(const ForwardArguments<T>& f, const Task& task, const RowMasks& masks,
                              const PackedRows& rows, const AttentionMemory<T, WIDTH>& memory,
                              const OnlineSoftmax& softmax, int first_channel) {
    const AttentionProblem<T>& p = f.problem;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float row_sum = quad_sum(softmax.row_sum[half]);
        if (lane_index() % 4 != 0) continue;
        float* stats = staged_stats(memory, lane_index() / 4 + half * 8);
        stats[0] = softmax.row_max[half];
        stats[1] = row_sum;
    }
    __syncwarp();
    const float prob_scale = prob_scale_for<T>(task.keys.count);
    for_each_staged(memory, min(p.value_channels - first_channel, CHUNK), [&](int r, int channel, Four sums) {
        const int c = first_channel + channel;
        const PackedRow query = rows[r];
        if (query.token >= task.queries.count) return;
        const float* staged = staged_stats(memory, r);
        RowStats stats{staged[0], staged[1], prob_scale};
        if (task.partial < 0) {
            const OutputPlace at(task.queries, query, p.heads, task.queries.row < p.kv_offsets.rows);
            stats.row_max = p.variant.max_score(stats.row_max);
            if (p.sinks != nullptr && at.in_row) scale(sums, stats.add_sink(p.sinks[query.head]));
            if (p.variant.kind.softmax && !masks.key_range(query.token).fully_masked()) stats.nan_if_zero();
            write_outputs(f.epilogue, at, c, p.value_channels, stats, sums);
            if (c == 0) write_lse(f.epilogue, at, stats);
            return;
        }
        const int64_t at = (task.partial * p.queries + query.token) * p.heads + query.head;
        store_four(f.partials.sums + at * p.value_channels + c, sums, min(p.value_channels - c, 4),
                   p.value_channels % 4 == 0);
        if (c > 0) return;
        f.partials.stats[2 * at] = stats.row_max;
        f.partials.stats[2 * at + 1] = stats.row_sum;
    });
}

// 16 queries for each warp, over the keys of their row or one split of them.
template <typename T, int WIDTH, bool OPTIONS>
__device__ void attend_tile(const ForwardArguments<T>& f, const TileGroup& group) {
    using Tiles = AttentionTiles<T, WIDTH>;
    const AttentionProblem<T>& p = f.problem;
    constexpr int kChunk = kChannelChunk<WIDTH, OPTIONS>, kChunks = WIDTH / kChunk;
    const int kv_head = group.index_in_slot() / kChunks, first_channel = group.index_in_slot() % kChunks * kChunk;
    const Task task = task_of(p, f.partials, group);
    if (task.idle) return;
    const Keys keys = task.keys;

    const PackedRows group_rows(task.begin, kv_head, p.q_per_kv);
    const PackedRows rows(task.begin + group.warp * kStationary, kv_head, p.q_per_kv);
    const auto masks = task.template masks<OPTIONS>(p);
    const auto tiles = task.key_tiles(masks, group_rows, group.rows(), Tiles::kStreamed, f.partials.split_kv);
    const auto warp_tiles = task.key_tiles(masks, rows, kStationary, Tiles::kStreamed, f.partials.split_kv);

    const SharedLayout layout = SharedLayout::of<T, WIDTH>(group.warps, f.plan.stages, contents_of(p));
    const AttentionMemory<T, WIDTH> memory(group, layout);
    cp_async_stationary(memory.stationary[0], p.q, p.channels, task.queries, rows);
    cp_async_commit();
    if (p.rope.inside.queries) rotate_stationary(memory.stationary[0], rotary_queries(p, task.queries, rows));
    if (p.variant.negates_queries()) negate(memory.stationary[0]);
    using OneQuery = Query<KeysOf<OPTIONS>>;
    const LaneQueries<OneQuery> queries(rows, common_range<T>(masks, rows),
                                        [&](const PackedRow& row) { return OneQuery{masks.key_range(row.token)}; });

    AccTile acc[kChunk / 16];
    OnlineSoftmax softmax;
    const float prob_scale = prob_scale_for<T>(keys.count);
    const auto copy = copy_of_keys < kKeepsAddresses<T> && !OPTIONS > (p, memory, group.threads, keys, kv_head);
    for_each_tile(
        group, tiles, f.plan.stages,
        [&](int tile, int stage) { copy.start(stage, tile, keys.count - tile * Tiles::kStreamed); },
        [&](int tile, int stage) { rotate_keys(p, copy, keys, tile, stage); },
        [&](int tile, int stage) {
            if (!warp_tiles.contains(tile)) return;
            const int first = tile * Tiles::kStreamed, count = keys.count - first;
            const auto attend = [&](auto blocks) {
                const auto at = places_of(queries.scores(first, 16 * blocks.value), rows, masks);
                attend_keys<blocks.value>(p, memory, stage, at, prob_scale, softmax, acc, first_channel);
            };
            // The first part alone where a tile has no more keys: the others would add zeros.
            if (Tiles::kPart == Tiles::kStreamed || count > Tiles::kPart)
                attend(std::integral_constant<int, Tiles::kStreamed / 16>{});
            else
                attend(std::integral_constant<int, Tiles::kBlocks>{});
        });
    cp_async_wait<0>();
    group.sync();
    stage_results(memory, acc, p.outer_scale);
    write_results<kChunk>(f, task, masks, rows, memory, softmax, first_channel);
}

template <typename T, int WIDTH>
__global__ void __launch_bounds__(kMaxWarps* kWarp, blocks_for(WIDTH))
    attend(const __grid_constant__ ForwardArguments<T> f) {
    for_each_item<kPersistent<T, WIDTH>>(f.plan,
                                         [&](const TileGroup& group) { attend_tile<T, WIDTH, false>(f, group); });
}
template <typename T, int WIDTH>
__global__ void __launch_bounds__(kMaxWarps* kWarp, kOptionBlocks)
    attend_with_options(const __grid_constant__ ForwardArguments<T> f) {
    for_each_item<kPersistent<T, WIDTH>>(f.plan,
                                         [&](const TileGroup& group) { attend_tile<T, WIDTH, true>(f, group); });
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
        return softmax ? p.variant.exponential(partial_stats[2 * item.at(split)] - base, 1.0f) : 1.0f;
    };
    if (softmax)
        for (int i = 0; i < item.num_splits; ++i) stats.row_sum += partial_stats[2 * item.at(i) + 1] * alpha(i);
    const PackedRow query{item.query / p.heads, item.query % p.heads};
    stats.row_max = p.variant.max_score(stats.row_max);
    const float sink_factor = p.sinks != nullptr ? stats.add_sink(p.sinks[query.head]) : 1.0f;
    if (softmax) stats.nan_if_zero();
    const OutputPlace place(p.queries_of(item.row), query, p.heads, true);
    if (lane_index() == 0) write_lse(f.epilogue, place, stats);
    const bool aligned = p.value_channels % 4 == 0;
    for (int c = lane_index() * 4; c < p.value_channels; c += kWarp * 4) {
        const int count = min(p.value_channels - c, 4);
        Four sums{};
        for (int i = 0; i < item.num_splits; ++i) {
            const Four split = load_four(f.partials.sums + item.at(i) * p.value_channels + c, 1, count, aligned);
            const float factor = alpha(i);
#pragma unroll
            for (int j = 0; j < 4; ++j) sums.values[j] += split.values[j] * factor;
        }
        scale(sums, sink_factor);
        write_outputs(f.epilogue, place, c, p.value_channels, stats, sums);
    }
}

// ---------------------------------------------------------------- launches

template <typename T, int WIDTH>
void start_attend(ForwardArguments<T>& f, const TensorView& scheduler, const Stream& stream) {
    const AttentionProblem<T>& p = f.problem;
    f.plan = plan_of<T, WIDTH>({p.mean_packed_rows(), p.mean_keys(), contents_of(p)});
    f.plan.slots = slots_of(p, f.partials, p.rows(), f.plan.rows());
    f.plan.items_per_slot = p.kv_heads;
    void (*kernel)(ForwardArguments<T>) = attend<T, WIDTH>;
    if constexpr (kServesOptions<WIDTH>)
        if (p.options.any) {
            kernel = attend_with_options<T, WIDTH>;
            f.plan.items_per_slot *= WIDTH / kChannelChunk<WIDTH, true>;
        }
    start_query_groups<kPersistent<T, WIDTH>>(kernel, f, scheduler, stream);
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
    const int64_t channels = to.out.shape[to.out.axes - 1];
    epilogue.out_aligned = four_aligned(epilogue.out, channels);
    epilogue.attn_out_aligned = four_aligned(epilogue.attn_out, channels);
    return epilogue;
}

}  // namespace

void attention_forward(const AttentionInputs& in, const AttentionOutputs& to, const ForwardWorkspace& workspace,
                       bool tf32, const Stream& stream) {
    check_forward(stream.checks(), in, to, workspace);
    if (to.out.size() == 0) return;
    with_element(in.k.dtype, tf32, [&](auto element) {
        using T = decltype(element);
        ForwardArguments<T> f{
            AttentionProblem<T>(in, workspace.rotated), epilogue_of<T>(in, to), Partials(workspace.splits), {}};
        with_width(in, f.problem.options,
                   [&](auto width) { start_attend<T, width.value>(f, workspace.scheduler, stream); });
        start_combine(combine_partials<T>, f, stream);
    });
}

}  // namespace cuda
}  // namespace interformer
