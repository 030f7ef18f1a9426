// Before dQ, dK and dV under softmax: delta and share of every query, from sums of P and of P * dP over its keys.
#include <cstdint>

#include "cuda/attention_gradient.cuh"
#include "cuda/attention_output.cuh"
#include "cuda/attention_plan.cuh"
#include "cuda/attention_split.cuh"

namespace interformer {
namespace cuda {

namespace {

template <typename T>
struct Shares : Gradient<T> {
    using Gradient<T>::Gradient;

    Pieces pieces;  // of rows that are split: both sums
};

template <typename T>
__host__ __device__ Contents contents_of(const AttentionProblem<T>&) {
    return {true, false, false};
}

// The sums of a lane's two rows over its columns. As in the forward, P is relative to a `unit`: so sums over
// gradients are finite where these are.
struct ShareSums {
    float total[2] = {}, mean[2] = {};
};

template <typename T>
__device__ void write_share(const Shares<T>& g, int64_t place, float unit, float total, float mean) {
    const float divisor = total == 0.0f ? 1.0f : total;
    g.delta[place] = mean / divisor;
    g.share[place] = unit / divisor;
}

template <typename T>
__device__ void write_shares(const Shares<T>& g, const Task& task, const Units& own, const ShareSums& sums) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float total = row_sum(sums.total[half]), mean = row_sum(sums.mean[half]);
        const Units::Unit unit = own[lane_index() / 4 + half * 8];
        if (lane_index() % 4 != 0 || unit.token >= task.queries.count) continue;
        if (task.piece < 0) {
            write_share(g, g.place(task.queries, unit), unit_weight<T>(task.keys.count), total, mean);
            continue;
        }
        const int64_t at = (task.piece * g.problem.queries + unit.token) * g.problem.heads + unit.head;
        g.pieces.weights[2 * at] = total;
        g.pieces.weights[2 * at + 1] = mean;
    }
}

// 16 queries by each warp, over the keys of their row or a chunk of them.
template <typename T, int WIDTH>
__device__ void sum_units(const Shares<T>& g, const Crew& crew) {
    using Tiles = AttentionTiles<T, WIDTH>;
    const AttentionProblem<T>& p = g.problem;
    const int kv_head = crew.part();
    const Task task = task_of(p, g.pieces, crew);
    if (task.idle) return;
    const Keys keys = task.keys;
    const Units all(task.begin, kv_head, p.group), own(task.begin + crew.warp * kOwn, kv_head, p.group);
    const TileRange tiles = task.key_tiles(p, all, crew.rows(), Tiles::kOthers, g.pieces.split);
    const TileRange mine = task.key_tiles(p, own, kOwn, Tiles::kOthers, g.pieces.split);

    const AttentionMemory<T, WIDTH> memory(crew, MemoryParts::of<T, WIDTH>(crew.warps, g.plan.stages, contents_of(p)));
    start_own(memory.own[0], p.q, p.channels, task.queries, own);
    start_own(memory.own[1], g.grad, p.value_channels, task.queries, own);
    close_copies();
    Side sides[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const Units::Unit unit = own[lane_index() / 4 + half * 8];
        sides[half] = {
            p.masks.sight(unit.token, task.queries.count, keys.count), 0.0f, 0.0f, unit_weight<T>(keys.count), {}};
        if (unit.token < task.queries.count) sides[half].lse = g.lse[g.place(task.queries, unit)];
    }

    ShareSums sums;
    each_tile(
        crew, tiles, g.plan.stages,
        [&](int tile, int stage) { start_keys(p, memory, crew.team, keys, kv_head, tile, stage); },
        [&](int tile, int stage) {
            if (!mine.holds(tile)) return;
            typename Tiles::Scores s, grad;
            multiply_rows(s, memory.own[0], memory.others[2 * stage], p.channels);
            multiply_rows(grad, memory.own[1], memory.others[2 * stage + (p.v_is_k ? 0 : 1)], p.value_channels);
            weigh_softmax(
                p, s, grad, 1.0f, [&](int half, int) -> const Side& { return sides[half]; },
                [&](int half, int column) { return sides[half].sight.sees(tile * Tiles::kOthers + column); });
            for_each_pair(s, grad, [&](int half, int, float& weight, float& of_mean) {
                sums.total[half] += weight;
                sums.mean[half] += of_mean;
            });
        });
    wait_copies<0>();
    write_shares(g, task, own, sums);
}

template <typename T, int WIDTH>
__global__ void __launch_bounds__(kMostWarps* kWarp, query_blocks_for<T>(WIDTH))
    sum_weights(const __grid_constant__ Shares<T> g) {
    each_item<kStays<T, WIDTH>>(g.plan, [&](const Crew& crew) { sum_units<T, WIDTH>(g, crew); });
}

// Joins the chunks of split rows, a query under a head by a warp.
template <typename T>
__global__ void __launch_bounds__(kMostWarps* kWarp) add_shares(const __grid_constant__ Shares<T> g) {
    const Joint joint = joint_of(g.problem, g.pieces, int64_t{blockIdx.x} * kMostWarps + threadIdx.x / kWarp);
    if (joint.chunks == 0 || lane_index() != 0) return;
    float total = 0.0f, mean = 0.0f;
    for (int i = 0; i < joint.chunks; ++i) {
        total += g.pieces.weights[2 * joint.at(i)];
        mean += g.pieces.weights[2 * joint.at(i) + 1];
    }
    write_share(g, joint.row * joint.units + joint.unit, unit_weight<T>(joint.keys), total, mean);
}

}  // namespace

void shares_backward(const AttentionInputs& in, const TensorView& grad_attn_out, const AttentionSides& sides,
                     const AttentionPieces& pieces, const TensorView& queue, bool tf32, const Stream& stream) {
    if (!in.score.softmax || in.q.size() == 0) return;
    with_element(in.k.dtype, tf32, [&](auto element) {
        using T = decltype(element);
        Shares<T> g(in, grad_attn_out, sides);
        g.pieces = Pieces(pieces);
        const AttentionProblem<T>& p = g.problem;
        with_width(in, [&](auto width) {
            g.plan = plan_of<T, width.value>({p.mean_units(), p.mean_keys(), contents_of(p)});
            g.plan.slots = slots_of(p, g.pieces, p.rows(), g.plan.rows());
            g.plan.parts = p.kv_heads;
            start_query_crews<kStays<T, width.value>>(sum_weights<T, width.value>, g, queue, stream);
        });
        join_chunks(add_shares<T>, g, stream);
    });
}

}  // namespace cuda
}  // namespace interformer
