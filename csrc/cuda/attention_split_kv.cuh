// Split KV: rows of many keys under few queries are split along their keys. Each split writes its partial to memory,
// and a later kernel combines the partials of a row in order. Rows that fit one split keep their bits.
#pragma once

#include <cstdint>

#include "cuda/attention.h"
#include "cuda/attention_problem.cuh"
#include "cuda/attention_tiles.cuh"
#include "cuda/stream.h"

namespace interformer {
namespace cuda {

// Memory for partials, by split, query and head.
struct Partials {
    float* sums = nullptr;   // sums over channels
    float* stats = nullptr;  // two statistics of a softmax
    int split_kv = 0;        // keys of a split; 0: no row is split

    Partials() = default;
    explicit Partials(const SplitKv& splits) : split_kv(static_cast<int>(splits.split_kv)) {
        if (splits.partials) sums = static_cast<float*>(splits.partials->data);
        if (splits.partial_stats) stats = static_cast<float*>(splits.partial_stats->data);
    }
};

// The work of a tile group: some queries of a row, over all of its keys or one split of them.
struct Task {
    Queries queries;
    Keys keys;
    int64_t begin;  // first packed row
    int split;
    int64_t partial;  // index of the split's partial; -1: the row is not split
    bool idle;

    // The masks of the task's row.
    template <bool OPTIONS, typename T>
    __device__ auto masks(const AttentionProblem<T>& p) const {
        return p.template masks_of<OPTIONS>(queries, keys);
    }
    // Tiles of `tile` keys that some of `rows` packed rows see, within the task's split.
    template <typename RowMasks>
    __device__ auto key_tiles(const RowMasks& masks, const PackedRows& packed_rows, int rows, int tile,
                              int split_kv) const {
        const auto tiles = masks.key_tiles(packed_rows.token, packed_rows[rows - 1].token, tile);
        return split_kv == 0 ? tiles : tiles.within(split * (split_kv / tile), (split + 1) * (split_kv / tile));
    }
};

// The task of a tile group's slot.
template <typename T>
__device__ inline Task task_of(const AttentionProblem<T>& p, const Partials& partials, const TileGroup& group) {
    const int64_t slot = group.slot();
    const int block = group.rows();
    Task task;
    task.split = 0;
    task.partial = -1;
    if (partials.split_kv == 0) {
        if (p.layout == QueryLayout::packed) {
            const Slot place = group.plan.scheduler.find(p.q_offsets, slot, p.q_per_kv, block);
            task.queries = p.packed_queries(place.span);
            task.keys = p.keys_beside(place.span);
            task.begin = place.begin;
        } else {  // in the backward of shared queries, `row` numbers shards of row groups
            const int64_t tiles = p.tiles_of_row(block), row = slot / tiles;
            task.queries = p.queries_of(row);
            task.keys = p.keys_of(min(row, p.kv_offsets.rows));
            task.begin = slot % tiles * block;
        }
        task.idle = task.begin >= int64_t{task.queries.count} * p.q_per_kv;
        return task;
    }
    const int64_t tiles = p.tiles_of_row(block);
    const Slot place = p.kv_offsets.find(slot / tiles, 1, partials.split_kv);
    task.begin = slot % tiles * block;
    task.queries = p.queries_of(place.span.row);
    task.keys = p.keys_of(place.span);
    task.split = static_cast<int>(place.begin / partials.split_kv);
    // A row without keys has a first split, too, which writes its outputs.
    task.idle = place.span.row >= p.kv_offsets.rows || place.begin >= max(task.keys.count, 1);
    if (task.keys.count > partials.split_kv)
        task.partial = partial_index(place.span.first, task.split, partials.split_kv);
    return task;
}

// Slots of `rows` rows (or row groups), in tiles of `block` packed rows.
template <typename T>
int64_t slots_of(const AttentionProblem<T>& p, const Partials& partials, int64_t rows, int block) {
    if (partials.split_kv == 0) return p.query_slots(rows, block);
    return slots(p.kv_offsets.tokens, rows, 1, partials.split_kv) * p.tiles_of_row(block);
}

// Starts a kernel whose tile groups take such slots. Only packed queries have rows of more work: other rows are split.
template <bool PERSISTENT, typename Arguments>
void start_query_groups(void (*kernel)(Arguments), Arguments& arguments, const TensorView& scheduler,
                        const Stream& stream) {
    const auto& p = arguments.problem;
    const TiledRows rows{p.q_offsets, p.q_per_kv, p.layout == QueryLayout::packed};
    start_tile_groups<PERSISTENT>(kernel, arguments, rows, scheduler, stream);
}

// ---------------------------------------------------------------- combining

// One query of a split row under one head: the work of a warp that combines partials.
struct CombineItem {
    int64_t row;
    int64_t first;       // index of the row's first partial
    int query, queries;  // query token times heads plus head, and how many a row has
    int keys;
    int num_splits;  // 0: there is no split row here

    // Place of a split's numbers.
    __device__ int64_t at(int split) const { return (first + split) * queries + query; }
};

template <typename T>
__device__ inline CombineItem combine_item_of(const AttentionProblem<T>& p, const Partials& partials, int64_t number) {
    CombineItem item{};
    item.queries = p.queries * p.heads;
    item.query = static_cast<int>(number % item.queries);
    const int64_t token = number / item.queries * partials.split_kv;
    const Span row = split_row_at(p.kv_offsets, token, partials.split_kv, p.skip);
    if (row.count == 0) return item;
    item.row = row.row;
    item.first = partial_index(row.first, 0, partials.split_kv);
    item.keys = p.keys_of(row).count;
    item.num_splits = (item.keys + partials.split_kv - 1) / partials.split_kv;
    return item;
}

// Starts a kernel that combines partials, one item for each warp, where rows are split.
template <typename Arguments>
void start_combine(void (*kernel)(Arguments), const Arguments& arguments, const Stream& stream) {
    const int split_kv = arguments.partials.split_kv;
    if (split_kv == 0) return;
    const auto& p = arguments.problem;
    const int64_t items = (p.kv_offsets.tokens / split_kv + 1) * p.queries * p.heads;
    stream.launch(kernel, (items + kMaxWarps - 1) / kMaxWarps, kMaxWarps * kWarp, 0, arguments);
}

}  // namespace cuda
}  // namespace interformer
