// dQ of the attention kernels.
#include <cstdint>

#include "cuda/attention_gradient.cuh"
#include "cuda/attention_plan.cuh"
#include "cuda/attention_split.cuh"

namespace interformer {
namespace cuda {

namespace {

template <typename T>
struct QueryGradient : Gradient<T> {
    using Gradient<T>::Gradient;

    T* grad_q = nullptr;      // or, of shared queries,
    float* sums = nullptr;    // sums over runs of rows and parts of their keys
    int64_t rows_of_run = 1;  // 1 also where queries are not shared
    int parts = 1;
    Pieces pieces;  // of rows that are split
};

template <typename T>
__host__ __device__ Contents contents_of(const AttentionProblem<T>& p) {
    return {true, !p.score.softmax, false};
}

// Channels whose sums a warp can hold beside its operands; wider heads are done in chunks.
template <typename T, int WIDTH>
constexpr int kChunk = sizeof(T) == 2 || WIDTH < 128 ? WIDTH : 128;

// Finished sums of the channels from `first` on, query by query.
template <typename T, int WIDTH>
__device__ void write_queries(const QueryGradient<T>& g, const Task& task, const Units& own,
                              const AttentionMemory<T, WIDTH>& memory, int first) {
    const AttentionProblem<T>& p = g.problem;
    float* sums = task.piece < 0 ? g.sums : g.pieces.sums;
#pragma unroll 1
    for (int r = 0; r < kOwn; ++r) {
        const Units::Unit unit = own[r];
        if (unit.token >= task.queries.count) break;
        const int64_t query =
            task.piece < 0 ? g.place(task.queries, unit) : (task.piece * p.queries + unit.token) * p.heads + unit.head;
        const int64_t to = query * p.channels + first;
        for (int c = lane_index(); c < min(p.channels - first, kChunk<T, WIDTH>); c += kWarp) {
            const float x = memory.staged[r * AttentionTiles<T, WIDTH>::kStaged + c];
            if (sums != nullptr)
                sums[to + c] = x;
            else
                g.grad_q[to + c] = narrow<T>(x);
        }
    }
}

// 16 queries by each warp, over the keys of their row or a chunk of them; of shared queries over a part of the keys of
// each row of a run.
template <typename T, int WIDTH>
__device__ void grad_units(const QueryGradient<T>& g, const Crew& crew) {
    using Tiles = AttentionTiles<T, WIDTH>;
    const AttentionProblem<T>& p = g.problem;
    constexpr int kChunks = WIDTH / kChunk<T, WIDTH>;
    const int first = crew.part() % kChunks * kChunk<T, WIDTH>, kv_head = crew.part() / kChunks;
    const Task task = task_of(p, g.pieces, crew);
    if (task.idle) return;
    const Units all(task.begin, kv_head, p.group), own(task.begin + crew.warp * kOwn, kv_head, p.group);
    const MemoryParts parts = MemoryParts::of<T, WIDTH>(crew.warps, g.plan.stages, contents_of(p));
    const AttentionMemory<T, WIDTH> memory(crew, parts);

    Sums sums[kChunk<T, WIDTH> / 16];
    // Of shared queries a slot's row is a part of a run.
    const int part = static_cast<int>(task.queries.row % g.parts);
    const int64_t begin = task.queries.row / g.parts * g.rows_of_run;
    const int64_t end = min(begin + g.rows_of_run, p.kv_offsets.rows);
#pragma unroll 1
    for (int64_t b = begin; b < end; ++b) {
        const Queries row = g.sums != nullptr ? p.queries_of(b) : task.queries;
        const Keys keys = g.sums != nullptr ? p.keys_of(b) : task.keys;
        const auto tiles_of = [&](const Units& of, int rows) {
            const TileRange found =
                p.masks.key_tiles(of.token, of[rows - 1].token, row.count, keys.count, Tiles::kOthers);
            const int chunk = g.pieces.split / Tiles::kOthers;
            if (chunk > 0) return found.within(task.chunk * chunk, (task.chunk + 1) * chunk);
            return found.within(found.stop * int64_t{part} / g.parts, found.stop * int64_t{part + 1} / g.parts);
        };
        const TileRange tiles = tiles_of(all, crew.rows()), mine = tiles_of(own, kOwn);
        if (tiles.count() == 0) continue;
        crew.meet();  // nobody reads what the row before left
        start_own(memory.own[0], p.q, p.channels, row, own);
        start_own(memory.own[1], g.grad, p.value_channels, row, own);
        close_copies();
        Side sides[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) sides[half] = g.side(row, own[lane_index() / 4 + half * 8], keys.count);

        each_tile(
            crew, tiles, g.plan.stages,
            [&](int tile, int stage) { start_keys(p, memory, crew.team, keys, kv_head, tile, stage); },
            [&](int tile, int stage) {
                if (!mine.holds(tile)) return;
                typename Tiles::Scores s, grad;
                multiply_rows(s, memory.own[0], memory.others[2 * stage], p.channels);
                multiply_rows(grad, memory.own[1], memory.others[2 * stage + (p.v_is_k ? 0 : 1)], p.value_channels);
                weigh(
                    p, s, grad, memory.scratch, [&](int half, int) -> const Side& { return sides[half]; },
                    [&](int half, int column) { return sides[half].sight.sees(tile * Tiles::kOthers + column); });
                add_weighed(sums, grad, memory.others[2 * stage], first);
            });
    }
    wait_copies<0>();
    crew.meet();
    stage(memory, sums, p.rest_scale * p.outer_scale);
    __syncwarp();
    write_queries(g, task, own, memory, first);
}

template <typename T, int WIDTH>
__global__ void __launch_bounds__(kMostWarps* kWarp, query_blocks_for<T>(WIDTH))
    grad_queries(const __grid_constant__ QueryGradient<T> g) {
    each_item<kStays<T, WIDTH>>(g.plan, [&](const Crew& crew) { grad_units<T, WIDTH>(g, crew); });
}

// Joins the chunks of split rows, a query under a head by a warp.
template <typename T>
__global__ void __launch_bounds__(kMostWarps* kWarp) add_pieces(const __grid_constant__ QueryGradient<T> g) {
    const AttentionProblem<T>& p = g.problem;
    const Joint joint = joint_of(p, g.pieces, int64_t{blockIdx.x} * kMostWarps + threadIdx.x / kWarp);
    if (joint.chunks == 0) return;
    const int64_t place = joint.row * joint.units + joint.unit;
    for (int c = lane_index(); c < p.channels; c += kWarp) {
        float sum = 0.0f;
        for (int i = 0; i < joint.chunks; ++i) sum += g.pieces.sums[joint.at(i) * p.channels + c];
        g.grad_q[place * p.channels + c] = narrow<T>(sum);
    }
}

template <typename T, int WIDTH>
void start_grad_queries(QueryGradient<T>& g, int64_t rows, const TensorView& queue, const Stream& stream) {
    const AttentionProblem<T>& p = g.problem;
    g.plan = plan_of<T, WIDTH>({p.mean_units(), p.mean_keys(), contents_of(p)});
    g.plan.slots = slots_of(p, g.pieces, rows, g.plan.rows());
    g.plan.parts = p.kv_heads * (WIDTH / kChunk<T, WIDTH>);
    start_query_crews<kStays<T, WIDTH>>(grad_queries<T, WIDTH>, g, queue, stream);
    join_chunks(add_pieces<T>, g, stream);
}

}  // namespace

void queries_backward(const AttentionInputs& in, const TensorView& grad_attn_out, const AttentionGradients& grads,
                      const AttentionSides& sides, const AttentionPieces& pieces, int64_t parts,
                      const TensorView& queue, bool tf32, const Stream& stream) {
    if (in.q.size() == 0) return;
    with_element(in.k.dtype, tf32, [&](auto element) {
        using T = decltype(element);
        QueryGradient<T> g(in, grad_attn_out, sides);
        const int64_t rows = g.problem.rows();
        with_width(in, [&](auto width) {
            if (in.layout != QueryLayout::shared) {
                g.grad_q = static_cast<T*>(grads.grad_q.data);
                g.pieces = Pieces(pieces);
                return start_grad_queries<T, width.value>(g, rows, queue, stream);
            }
            const int64_t runs = grads.grad_q.shape[0] / parts;
            g.sums = static_cast<float*>(grads.grad_q.data);
            g.parts = static_cast<int>(parts);
            g.rows_of_run = runs > 0 ? (rows + runs - 1) / runs : 1;
            start_grad_queries<T, width.value>(g, runs * parts, queue, stream);
        });
    });
}

}  // namespace cuda
}  // namespace interformer
