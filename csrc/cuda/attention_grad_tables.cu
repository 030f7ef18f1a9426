// Gradients of sinks and of bias tables: sums over all queries, or over all scores. Each worker has sums of its own,
// for which it goes through its share of the work in order; then the workers' sums are added in order.
#include <cstdint>

#include "cuda/attention_gradient.cuh"
#include "cuda/attention_plan.cuh"
#include "cuda/attention_split_kv.cuh"

namespace interformer {
namespace cuda {

namespace {

constexpr int kThreads = kMaxWarps * kWarp;

// ---------------------------------------------------------------- sums of workers

// The sums of `workers` workers, [workers, heads, entries], become a table [heads or 1, entries], times `scale`.
struct WorkerSums {
    const float* sums;
    float* table;
    int64_t workers;
    int heads, table_heads, entries;
    double scale;
};

__global__ void __launch_bounds__(kThreads) add_workers(const __grid_constant__ WorkerSums w) {
    const int64_t place = int64_t{blockIdx.x} * kThreads + threadIdx.x, numbers = int64_t{w.heads} * w.entries;
    if (place >= int64_t{w.table_heads} * w.entries) return;
    double sum = 0.0;
    for (int64_t i = 0; i < w.workers; ++i)
        for (int64_t at = place; at < numbers; at += int64_t{w.table_heads} * w.entries)
            sum += w.sums[i * numbers + at];
    w.table[place] = static_cast<float>(sum * w.scale);
}

void start_add_workers(const TensorView& sums, const TensorView& table, double scale, const Stream& stream) {
    const int entries = static_cast<int>(sums.shape[2]);
    const int64_t table_heads = table.axes > 1 ? table.shape[0] : sums.shape[1];
    const WorkerSums w{static_cast<const float*>(sums.data),
                       static_cast<float*>(table.data),
                       sums.shape[0],
                       static_cast<int>(sums.shape[1]),
                       static_cast<int>(table_heads),
                       entries,
                       scale};
    stream.launch(add_workers, (table_heads * entries + kThreads - 1) / kThreads, kThreads, 0, w);
}

// ---------------------------------------------------------------- sinks

template <typename T>
struct SinkArguments : BackwardArguments<T> {
    using BackwardArguments<T>::BackwardArguments;

    float* sums = nullptr;  // [workers, heads]
    int64_t workers = 0, tokens = 0;
};

// The probability of a query's sink has no value: its gradient is that of a score with dP = 0. A worker is a block for
// a head, and has equally many tokens.
template <typename T>
__global__ void __launch_bounds__(kThreads) sum_sinks(const __grid_constant__ SinkArguments<T> g) {
    const AttentionProblem<T>& p = g.problem;
    const int64_t worker = blockIdx.x / p.heads, size = (g.tokens + g.workers - 1) / g.workers;
    const int head = static_cast<int>(blockIdx.x % p.heads);
    const int64_t in_rows = p.layout == QueryLayout::packed ? p.q_offsets.edge(p.q_offsets.rows) : g.tokens;
    float sum = 0.0f;
    for (int64_t t = worker * size + threadIdx.x; t < min((worker + 1) * size, in_rows); t += kThreads) {
        const int64_t at = t * p.heads + head;
        sum -= sink_prob(p.sinks[head], g.lse[at]) * g.inv_row_sum[at] * g.delta[at];
    }
    float* sums = reinterpret_cast<float*>(shared_memory());
    sum = warp_sum(sum);
    if (lane_index() == 0) sums[threadIdx.x / kWarp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) g.sums[blockIdx.x] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

void sinks_backward(const Backward& call) {
    const TensorView& sums = *call.workspace.sink_sums;
    with_element(call.in.k.dtype, [&](auto element) {
        using T = decltype(element);
        SinkArguments<T> g(call);
        g.sums = static_cast<float*>(sums.data);
        g.workers = sums.shape[0];
        g.tokens = g.problem.query_tokens();
        call.stream.launch(sum_sinks<T>, g.workers * g.problem.heads, kThreads, kMaxWarps * 4, g);
        start_add_workers(sums, *call.grads.variant.sinks, g.problem.outer_scale, call.stream);
    });
}

// ---------------------------------------------------------------- biases

// The tables of a worker, [heads, entries]; null where a table is not given.
struct BiasSums {
    float *by_distance = nullptr, *by_time = nullptr;
};

template <typename T>
struct BiasArguments : BackwardArguments<T> {
    using BackwardArguments<T>::BackwardArguments;

    BiasSums sums;  // of the first worker
    int64_t workers = 0;
};

template <typename T>
__host__ __device__ Contents contents_of(const AttentionProblem<T>&) {
    return {true, true, false, true};
}

// Adds one query's gradients to its row of a table by distance, one for each lane: neighbouring keys have neighbouring
// entries, but for those at the ends, where all that is farther is added up. Lanes without a key have a gradient of 0.
__device__ void add_by_distance(float* table, int entries, int entry, float grad) {
    const bool at_begin = entry <= 0, at_end = !at_begin && entry >= entries - 1;
    if (!at_begin && !at_end && grad != 0.0f) table[entry] += grad;
    if (!__any_sync(kAllLanes, at_begin || at_end)) return;
    const float begin = warp_sum(at_begin ? grad : 0.0f), end = warp_sum(at_end ? grad : 0.0f);
    if (lane_index() > 0) return;
    table[0] += begin;
    if (entries > 1) table[entries - 1] += end;
}

// The same for a table by time, where any keys may have one entry: one entry after another.
__device__ void add_by_time(float* table, int entry, float grad) {
    for (unsigned left = __ballot_sync(kAllLanes, grad != 0.0f); left != 0;) {
        const int leader = __ffs(static_cast<int>(left)) - 1, now = __shfl_sync(kAllLanes, entry, leader);
        const float sum = warp_sum(entry == now ? grad : 0.0f);
        if (lane_index() == leader) table[now] += sum;
        left &= ~__ballot_sync(kAllLanes, entry == now);
    }
}

// Adds the gradients of a part of a tile's scores, `d`, to a worker's tables: query by query, a lane for each key.
template <typename T, int N>
__device__ void add_scores(const AttentionProblem<T>& p, const BiasSums& sums, AccTile (&d)[N], float* staged,
                           const PackedRows& rows, const OptionRowMasks& row, int first_key) {
    constexpr int kColumns = 16 * N;
    for_each(d, [&](int half, int column, float& g) { staged[(lane_index() / 4 + half * 8) * kColumns + column] = g; });
    __syncwarp();
    const Biases& biases = p.options.biases;
    const int column = lane_index() % kColumns, key = min(first_key + column, row.sizes.keys - 1);
    const bool has_key = lane_index() < kColumns && first_key + column < row.sizes.keys;
#pragma unroll 1
    for (int r = 0; r < kStationary; ++r) {
        const PackedRow query = rows[r];
        if (query.token >= row.sizes.queries) break;
        const float grad = has_key ? staged[r * kColumns + column] : 0.0f;
        if (sums.by_distance != nullptr) {
            const int entries = biases.by_distance.entries;
            add_by_distance(sums.by_distance + int64_t{query.head} * entries, entries,
                            biases.distance_entry(row, query.token, key), grad);
        }
        if (sums.by_time != nullptr)
            add_by_time(sums.by_time + int64_t{query.head} * biases.by_time.entries,
                        biases.time_entry(row, query.token, key), grad);
        __syncwarp();  // the next query may have other lanes at these entries
    }
}

// 16 queries of a warp, over the keys of their row.
template <typename T, int WIDTH>
__device__ void sum_tile(const BiasArguments<T>& g, const BiasSums& sums, const TileGroup& group) {
    using Tiles = AttentionTiles<T, WIDTH>;
    const AttentionProblem<T>& p = g.problem;
    const int kv_head = group.index_in_slot();
    const Task task = task_of(p, Partials(), group);
    if (task.idle) return;
    const PackedRows rows(task.begin, kv_head, p.q_per_kv);
    const auto masks = task.template masks<true>(p);
    const auto tiles = task.key_tiles(masks, rows, kStationary, Tiles::kStreamed, 0);
    group.sync();  // the warp is done with the shared memory of the item before
    const SharedLayout layout = SharedLayout::of<T, WIDTH>(group.warps, g.plan.stages, contents_of(p));
    const AttentionMemory<T, WIDTH> memory(group, layout);
    load_queries_and_grads(memory, g, task.queries, rows);
    using OneQuery = QueryStats<KeySet>;
    const LaneQueries<OneQuery> queries(rows, common_range<T>(masks, rows),
                                        [&](const PackedRow& row) { return g.query_stats(masks, task.queries, row); });
    for_each_key_tile(p, group, memory, g.plan.stages, tiles, tiles, task.keys, kv_head, queries,
                      [&](typename Tiles::Scores& s, typename Tiles::Scores& d, const auto& at, int, int) {
                          scores_gradients(p, s, d, memory.scratch, places_of(at, rows, masks));
                          float* staged = reinterpret_cast<float*>(memory.scratch - lane_index());
                          __syncwarp();
                          add_scores(p, sums, d, staged, rows, masks, at.first_key);
                          __syncwarp();
                      });
    cp_async_wait<0>();
}

// A worker is a warp.
template <typename T, int WIDTH>
__global__ void __launch_bounds__(kThreads, kOptionBlocks) sum_biases(const __grid_constant__ BiasArguments<T> g) {
    const AttentionProblem<T>& p = g.problem;
    const int64_t worker = int64_t{blockIdx.x} * g.plan.warps + threadIdx.x / kWarp;
    if (worker >= g.workers) return;
    BiasSums sums = g.sums;
    const auto begin = [&](float*& table, const BiasTable& bias) {
        if (table == nullptr) return;
        const int64_t numbers = int64_t{p.heads} * bias.entries;
        table += worker * numbers;
        for (int64_t i = lane_index(); i < numbers; i += kWarp) table[i] = 0.0f;
    };
    begin(sums.by_distance, p.options.biases.by_distance);
    begin(sums.by_time, p.options.biases.by_time);
    __syncwarp();
#pragma unroll 1
    for (int64_t item = worker; item < g.plan.items(); item += g.workers)
        sum_tile<T, WIDTH>(g, sums, TileGroup(g.plan, item, thread_index()));
}

template <typename T, int WIDTH>
void start_sum_biases(BiasArguments<T>& g, const Stream& stream) {
    const AttentionProblem<T>& p = g.problem;
    g.plan = plan_of<T, WIDTH>({0, p.mean_keys(), contents_of(p)});  // every warp by itself
    g.plan.slots = p.query_slots(p.rows(), g.plan.rows());
    g.plan.items_per_slot = p.kv_heads;
    stream.launch(sum_biases<T, WIDTH>, (g.workers + g.plan.warps - 1) / g.plan.warps, g.plan.threads(),
                  g.plan.shared(), g);
}

void biases_backward(const Backward& call) {
    const std::optional<TensorView>&by_distance = call.workspace.position_sums, &by_time = call.workspace.time_sums;
    with_element(call.in.k.dtype, call.tf32, [&](auto element) {
        using T = decltype(element);
        BiasArguments<T> g(call);
        g.workers = (by_distance ? *by_distance : *by_time).shape[0];
        if (by_distance) g.sums.by_distance = static_cast<float*>(by_distance->data);
        if (by_time) g.sums.by_time = static_cast<float*>(by_time->data);
        with_width(call.in, g.problem.options, [&](auto width) {
            if constexpr (kServesOptions<width.value>) start_sum_biases<T, width.value>(g, call.stream);
        });
        const double scale = g.problem.outer_scale;
        if (by_distance) start_add_workers(*by_distance, *call.grads.variant.position_bias, scale, call.stream);
        if (by_time) start_add_workers(*by_time, *call.grads.variant.time_bias, scale, call.stream);
    });
}

}  // namespace

void tables_backward(const Backward& call) {
    if (call.workspace.sink_sums) sinks_backward(call);
    if (call.workspace.position_sums || call.workspace.time_sums) biases_backward(call);
}

}  // namespace cuda
}  // namespace interformer
