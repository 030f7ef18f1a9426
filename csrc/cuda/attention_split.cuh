// Rows of many keys under few queries are cut into chunks, one after another in memory what each of them sums up; a
// kernel after that joins them in order. Rows that fit one chunk are not touched by it, bit by bit.
#pragma once

#include <cstdint>

#include "cuda/attention.h"
#include "cuda/attention_problem.cuh"
#include "cuda/attention_tiles.cuh"
#include "cuda/stream.h"

namespace interformer {
namespace cuda {

// Memory for the chunks' sums, by piece, query and head.
struct Pieces {
    float* sums = nullptr;     // of channels
    float* weights = nullptr;  // two numbers
    int split = 0;             // keys of a chunk; 0: no row is split

    Pieces() = default;
    explicit Pieces(const AttentionPieces& given) : split(static_cast<int>(given.split)) {
        if (given.sums) sums = static_cast<float*>(given.sums->data);
        if (given.weights) weights = static_cast<float*>(given.weights->data);
    }
};

// What a block or a warp does: some queries of a row, over all keys or a chunk of them.
struct Task {
    Queries queries;
    Keys keys;
    int64_t begin;  // unit of the row
    int chunk;
    int64_t piece;  // of a row that is split; else -1
    bool idle;

    // Tiles of `tile` keys that some of `rows` units see, of the task's chunk of `split` keys.
    template <typename T>
    __device__ TileRange key_tiles(const AttentionProblem<T>& p, const Units& of, int rows, int tile, int split) const {
        const TileRange found = p.masks.key_tiles(of.token, of[rows - 1].token, queries.count, keys.count, tile);
        return split == 0 ? found : found.within(chunk * (split / tile), (chunk + 1) * (split / tile));
    }
};

// Of the slot of a crew.
template <typename T>
__device__ inline Task task_of(const AttentionProblem<T>& p, const Pieces& pieces, const Crew& crew) {
    const int64_t slot = crew.slot();
    const int block = crew.rows();
    Task task;
    task.chunk = 0;
    task.piece = -1;
    if (pieces.split == 0) {
        if (p.layout == QueryLayout::packed) {
            const Slot found = crew.plan.queue.find(p.q_offsets, slot, p.group, block);
            task.queries = p.packed_queries(found.span);
            task.keys = p.keys_beside(found.span);
            task.begin = found.begin;
        } else {  // of shared queries, `row` may be one of runs
            const int64_t tiles = p.tiles_of_row(block), row = slot / tiles;
            task.queries = p.queries_of(row);
            task.keys = p.keys_of(min(row, p.kv_offsets.rows));
            task.begin = slot % tiles * block;
        }
        task.idle = task.begin >= int64_t{task.queries.count} * p.group;
        return task;
    }
    const int64_t tiles = p.tiles_of_row(block);
    const Slot found = p.kv_offsets.find(slot / tiles, 1, pieces.split);
    task.begin = slot % tiles * block;
    task.queries = p.queries_of(found.span.row);
    task.keys = p.keys_of(found.span);
    task.chunk = static_cast<int>(found.begin / pieces.split);
    // Also a row without keys has a first chunk, which writes its outputs.
    task.idle = found.span.row >= p.kv_offsets.rows || found.begin >= max(task.keys.count, 1);
    if (task.keys.count > pieces.split) task.piece = piece_of(found.span.first, task.chunk, pieces.split);
    return task;
}

// Slots of tiles of `block` units over `rows` rows (or runs of them).
template <typename T>
int64_t slots_of(const AttentionProblem<T>& p, const Pieces& pieces, int64_t rows, int block) {
    if (pieces.split == 0) return p.query_slots(rows, block);
    return slots(p.kv_offsets.tokens, rows, 1, pieces.split) * p.tiles_of_row(block);
}

// Starts a kernel whose crews take such slots. Only packed queries have rows of more work: other rows are cut.
template <bool STAYS, typename Arguments>
void start_query_crews(void (*kernel)(Arguments), Arguments& of, const TensorView& queue, const Stream& stream) {
    const auto& p = of.problem;
    start_crews<STAYS>(kernel, of, p.q_offsets, p.group, p.layout == QueryLayout::packed, queue, stream);
}

// A query under a head of a split row, as an item of a kernel that joins chunks.
struct Joint {
    int64_t row, first;  // row, and piece of its first chunk
    int unit, units;     // of the row: query token times heads plus head
    int keys;
    int chunks;  // 0: there is no split row here

    // Where the numbers of a chunk are.
    __device__ int64_t at(int chunk) const { return (first + chunk) * units + unit; }
};

template <typename T>
__device__ inline Joint joint_of(const AttentionProblem<T>& p, const Pieces& pieces, int64_t item) {
    Joint found{};
    found.units = p.queries * p.heads;
    found.unit = static_cast<int>(item % found.units);
    const Span row = joined_at(p.kv_offsets, item / found.units * pieces.split, pieces.split, p.skip);
    if (row.count == 0) return found;
    found.row = row.row;
    found.first = piece_of(row.first, 0, pieces.split);
    found.keys = p.keys_of(row).count;
    found.chunks = (found.keys + pieces.split - 1) / pieces.split;
    return found;
}

// Starts such a kernel, which takes a joint by each warp, where rows are split.
template <typename Arguments>
void join_chunks(void (*kernel)(Arguments), const Arguments& of, const Stream& stream) {
    if (of.pieces.split == 0) return;
    const auto& p = of.problem;
    const int64_t joints = (p.kv_offsets.tokens / of.pieces.split + 1) * p.queries * p.heads;
    stream.launch(kernel, (joints + kMostWarps - 1) / kMostWarps, kMostWarps * kWarp, 0, of);
}

}  // namespace cuda
}  // namespace interformer
