// dQ of the attention kernels.
#include <cstdint>

#include "cuda/attention_gradient.cuh"
#include "cuda/attention_plan.cuh"
#include "cuda/attention_split_kv.cuh"

namespace interformer {
namespace cuda {

namespace {

// Gradients of shared queries are sums over row groups (consecutive rows) and over key shards of their rows: there a
// slot's row is a shard of a row group. Other queries have one row in a group, and one shard.
template <typename T>
struct QueryArguments : BackwardArguments<T> {
    using BackwardArguments<T>::BackwardArguments;

    T* grad_q = nullptr;  // null for shared queries
    bool grad_q_aligned = false;
    float* group_sums = nullptr;  // of shared queries, by row group and key shard
    int64_t rows_per_group = 1;
    int key_shards = 1;
    Partials partials;
};

template <typename T>
__host__ __device__ Contents contents_of(const AttentionProblem<T>& p) {
    return {true, p.maps_in_memory(), false, p.options.any};
}

// Channels for which a warp can hold accumulators beside its operands; wider heads take several channel chunks. Options
// take registers.
template <typename T, int WIDTH, bool OPTIONS>
constexpr int kChannelChunk = (sizeof(T) == 2 && !OPTIONS) || WIDTH < 128 ? WIDTH : 128;

// Writes a warp's results for the channels from `first` on, several queries at once.
template <int CHUNK, typename T, int WIDTH>
__device__ void write_queries(const QueryArguments<T>& g, const Task& task, const PackedRows& rows,
                              const AttentionMemory<T, WIDTH>& memory, int first) {
    const AttentionProblem<T>& p = g.problem;
    float* sums = task.partial < 0 ? g.group_sums : g.partials.sums;
    const int channels = min(p.channels - first, CHUNK);
    for_each_staged(memory, channels, [&](int r, int c, const Four& grads) {
        const PackedRow row = rows[r];
        if (row.token >= task.queries.count) return;
        const int64_t query =
            task.partial < 0 ? g.place(task.queries, row) : (task.partial * p.queries + row.token) * p.heads + row.head;
        const int64_t to = query * p.channels + first + c;
        if (sums != nullptr)
            store_four(sums + to, grads, channels - c, p.channels % 4 == 0);
        else
            store_four(g.grad_q + to, grads, channels - c, g.grad_q_aligned);
    });
}

// Accumulates dQ of 16 queries for each warp over one row's keys, or one split or shard of them.
template <bool OPTIONS, typename T, int WIDTH, int C>
__device__ void accumulate_row(const QueryArguments<T>& g, const TileGroup& group, const Task& task,
                               const AttentionMemory<T, WIDTH>& memory, AccTile (&acc)[C], const Queries& queries,
                               const Keys& keys, int kv_head, int key_shard, int first) {
    using Tiles = AttentionTiles<T, WIDTH>;
    const AttentionProblem<T>& p = g.problem;
    const PackedRows group_rows(task.begin, kv_head, p.q_per_kv);
    const PackedRows rows(task.begin + group.warp * kStationary, kv_head, p.q_per_kv);
    const auto masks = p.template masks_of<OPTIONS>(queries, keys);
    const auto tiles_of = [&](const PackedRows& packed_rows, int count) {
        const auto range = masks.key_tiles(packed_rows.token, packed_rows[count - 1].token, Tiles::kStreamed);
        const int tiles_per_split = g.partials.split_kv / Tiles::kStreamed;
        if (tiles_per_split > 0) return range.within(task.split * tiles_per_split, (task.split + 1) * tiles_per_split);
        return range.within(range.stop * int64_t{key_shard} / g.key_shards,
                            range.stop * int64_t{key_shard + 1} / g.key_shards);
    };
    const auto tiles = tiles_of(group_rows, group.rows()), warp_tiles = tiles_of(rows, kStationary);
    if (tiles.count() == 0) return;
    group.sync();  // all threads are done with the shared memory of the row before
    load_queries_and_grads(memory, g, queries, rows);
    using OneQuery = QueryStats<KeysOf<OPTIONS>>;
    const LaneQueries<OneQuery> lane_queries(rows, common_range<T>(masks, rows),
                                             [&](const PackedRow& row) { return g.query_stats(masks, queries, row); });

    for_each_key_tile(p, group, memory, g.plan.stages, tiles, warp_tiles, keys, kv_head, lane_queries,
                      [&](typename Tiles::Scores& s, typename Tiles::Scores& d, const auto& at, int row, int stage) {
                          scores_backward(p, s, d, memory.scratch, places_of(at, rows, masks));
                          multiply_accumulate(acc, d, memory.streamed[2 * stage], row, first);
                      });
}

// 16 queries for each warp, over the keys of their row or one split of them; for shared queries, over one key shard of
// each row of a row group.
template <typename T, int WIDTH, bool OPTIONS>
__device__ void grad_tile(const QueryArguments<T>& g, const TileGroup& group) {
    const AttentionProblem<T>& p = g.problem;
    constexpr int kChunk = kChannelChunk<T, WIDTH, OPTIONS>, kChunks = WIDTH / kChunk;
    const int first = group.index_in_slot() % kChunks * kChunk;
    const int kv_head = group.index_in_slot() / kChunks;
    const Task task = task_of(p, g.partials, group);
    if (task.idle) return;
    const SharedLayout layout = SharedLayout::of<T, WIDTH>(group.warps, g.plan.stages, contents_of(p));
    const AttentionMemory<T, WIDTH> memory(group, layout);

    AccTile acc[kChunk / 16];
    const int key_shard = static_cast<int>(task.queries.row % g.key_shards);
    const int64_t begin = task.queries.row / g.key_shards * g.rows_per_group;
    const int64_t end = min(begin + g.rows_per_group, p.kv_offsets.rows);
#pragma unroll 1
    for (int64_t b = begin; b < end; ++b) {
        const Queries queries = g.group_sums != nullptr ? p.queries_of(b) : task.queries;
        const Keys keys = g.group_sums != nullptr ? p.keys_of(b) : task.keys;
        accumulate_row<OPTIONS>(g, group, task, memory, acc, queries, keys, kv_head, key_shard, first);
    }
    cp_async_wait<0>();
    group.sync();
    stage_results(memory, acc, p.grad_scale * p.outer_scale);
    __syncwarp();
    const PackedRows rows(task.begin + group.warp * kStationary, kv_head, p.q_per_kv);
    // Tokens of the tail have gradients of zero, and positions of any content.
    if (p.rope.half > 0 && task.queries.row < p.kv_offsets.rows)
        rotate_back(memory, rotary_queries(p, task.queries, rows));
    write_queries<kChunk>(g, task, rows, memory, first);
}

template <typename T, int WIDTH>
__global__ void __launch_bounds__(kMaxWarps* kWarp, query_blocks_for<T>(WIDTH))
    grad_queries(const __grid_constant__ QueryArguments<T> g) {
    for_each_item<kPersistent<T, WIDTH>>(g.plan, [&](const TileGroup& group) { grad_tile<T, WIDTH, false>(g, group); });
}
template <typename T, int WIDTH>
__global__ void __launch_bounds__(kMaxWarps* kWarp, kOptionBlocks)
    grad_queries_with_options(const __grid_constant__ QueryArguments<T> g) {
    for_each_item<kPersistent<T, WIDTH>>(g.plan, [&](const TileGroup& group) { grad_tile<T, WIDTH, true>(g, group); });
}

// Combines the partials of split rows, one query under one head for each warp.
template <typename T>
__global__ void __launch_bounds__(kMaxWarps* kWarp) combine_partials(const __grid_constant__ QueryArguments<T> g) {
    const AttentionProblem<T>& p = g.problem;
    const int64_t number = int64_t{blockIdx.x} * kMaxWarps + threadIdx.x / kWarp;
    const CombineItem item = combine_item_of(p, g.partials, number);
    if (item.num_splits == 0) return;
    const int64_t place = item.row * item.queries + item.query;
    for (int c = lane_index(); c < p.channels; c += kWarp) {
        float sum = 0.0f;
        for (int i = 0; i < item.num_splits; ++i) sum += g.partials.sums[item.at(i) * p.channels + c];
        g.grad_q[place * p.channels + c] = narrow<T>(sum);
    }
}

// `rows`: rows, or shards of row groups, that have slots.
template <typename T, int WIDTH>
void start_grad_queries(QueryArguments<T>& g, int64_t rows, const Backward& call) {
    const AttentionProblem<T>& p = g.problem;
    g.plan = plan_of<T, WIDTH>({p.mean_packed_rows(), p.mean_keys(), contents_of(p)});
    g.plan.slots = slots_of(p, g.partials, rows, g.plan.rows());
    void (*kernel)(QueryArguments<T>) = grad_queries<T, WIDTH>;
    int chunks = WIDTH / kChannelChunk<T, WIDTH, false>;
    if constexpr (kServesOptions<WIDTH>) {
        if (p.options.any) kernel = grad_queries_with_options<T, WIDTH>, chunks = WIDTH / kChannelChunk<T, WIDTH, true>;
    }
    g.plan.items_per_slot = p.kv_heads * chunks;
    start_query_groups<kPersistent<T, WIDTH>>(kernel, g, call.workspace.scheduler, call.stream);
    start_combine(combine_partials<T>, g, call.stream);
}

}  // namespace

void queries_backward(const Backward& call) {
    if (call.in.q.size() == 0) return;
    with_element(call.in.k.dtype, call.tf32, [&](auto element) {
        using T = decltype(element);
        QueryArguments<T> g(call);
        const int64_t rows = g.problem.rows(), key_shards = call.workspace.key_shards;
        const TensorView& grad_q = call.grads.grad_q;
        with_width(call.in, g.problem.options, [&](auto width) {
            if (call.in.layout != QueryLayout::shared) {
                g.grad_q = static_cast<T*>(grad_q.data);
                g.grad_q_aligned = four_aligned(g.grad_q, g.problem.channels);
                g.partials = Partials(call.workspace.splits);
                return start_grad_queries<T, width.value>(g, rows, call);
            }
            const int64_t row_groups = grad_q.shape[0] / key_shards;
            g.group_sums = static_cast<float*>(grad_q.data);
            g.key_shards = static_cast<int>(key_shards);
            g.rows_per_group = row_groups > 0 ? (rows + row_groups - 1) / row_groups : 1;
            start_grad_queries<T, width.value>(g, row_groups * key_shards, call);
        });
    });
}

}  // namespace cuda
}  // namespace interformer
