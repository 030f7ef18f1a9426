// Forward of the attention kernels: an online softmax, or a plain sum, over the keys of a row or a chunk of them.
#include <cstdint>

#include "cuda/attention.h"
#include "cuda/attention_output.cuh"
#include "cuda/attention_plan.cuh"
#include "cuda/attention_split.cuh"

namespace interformer {
namespace cuda {

namespace {

template <typename T>
struct Forward {
    AttentionProblem<T> problem;
    Epilogue<T> epilogue;
    Pieces pieces;
    Plan plan;
};

template <typename T>
__host__ __device__ Contents contents_of(const AttentionProblem<T>& p) {
    return {false, !p.score.softmax, false};
}

// Of the two rows of a lane: the largest score so far, and the total of this lane's weights relative to it.
struct Running {
    float largest[2] = {-INFINITY, -INFINITY}, total[2] = {};
};

// Products of a tile of keys, the first one being key `first`, become weights, `unit` being that of the largest score;
// the sums under the scale so far are to be multiplied by `factor`.
template <typename T, int N>
__device__ void fold(const AttentionProblem<T>& p, Sums (&s)[N], const Sight (&sight)[2], int first, float unit,
                     float2* scratch, Running& running, float (&factor)[2]) {
    const float hidden = p.score.softmax ? -INFINITY : 0.0f;
    for_each(s, [&](int half, int column, float& x) { x = sight[half].sees(first + column) ? p.scored(x) : hidden; });
    if (!p.score.softmax) {
        Sums none[N];
        map_one_by_one(s, none, scratch,
                       [&](float& x, float&) { x = p.inner_scale * activate(x, p.score.activation); });
        factor[0] = factor[1] = 1.0f;
        return;
    }
    float top[2] = {-INFINITY, -INFINITY}, base[2];
    for_each(s, [&](int half, int, float& x) { top[half] = fmaxf(top[half], x); });
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float before = running.largest[i], now = fmaxf(before, row_max(top[i]));
        base[i] = now == -INFINITY ? 0.0f : now;  // nothing is seen yet: all weights are 0
        factor[i] = exp2f((before - base[i]) * kLog2E);
        running.largest[i] = now;
        running.total[i] *= factor[i];
    }
    for_each(s, [&](int half, int, float& x) {
        x = exp2f((x - base[half]) * kLog2E) * unit;
        running.total[half] += x;
    });
}

// Writes what the warp summed up, query by query: outputs, or a piece of them.
template <typename T, int WIDTH>
__device__ void finish(const Forward<T>& f, const Task& task, const Units& units,
                       const AttentionMemory<T, WIDTH>& memory, const Running& running) {
    const AttentionProblem<T>& p = f.problem;
    const float sums[2] = {row_sum(running.total[0]), row_sum(running.total[1])};
    const float unit_of_row = unit_weight<T>(task.keys.count);
#pragma unroll 1
    for (int r = 0; r < kOwn; ++r) {
        const Units::Unit unit = units[r];
        const int lane = r % 8 * 4;
        Total total{__shfl_sync(kAllLanes, r < 8 ? running.largest[0] : running.largest[1], lane),
                    __shfl_sync(kAllLanes, r < 8 ? sums[0] : sums[1], lane), unit_of_row};
        if (unit.token >= task.queries.count) break;
        const float* staged = memory.staged + r * AttentionTiles<T, WIDTH>::kStaged;
        if (task.piece < 0) {
            const OutputPlace at(task.queries, unit.token, unit.head, p.heads, task.queries.row < p.kv_offsets.rows);
            const Sight sight = p.masks.sight(unit.token, task.queries.count, task.keys.count);
            if (p.score.softmax && sight.sees_any()) total.of_some_key();
            finish_query(f.epilogue, at, p.value_channels, total, [&](int c) { return staged[c]; });
            continue;
        }
        const int64_t at = (task.piece * p.queries + unit.token) * p.heads + unit.head;
        for (int c = lane_index(); c < p.value_channels; c += kWarp)
            f.pieces.sums[at * p.value_channels + c] = staged[c];
        if (lane_index() == 0) {
            f.pieces.weights[2 * at] = total.largest;
            f.pieces.weights[2 * at + 1] = total.sum;
        }
    }
}

// 16 queries by each warp, over the keys of their row or a chunk of them.
template <typename T, int WIDTH>
__device__ void attend_units(const Forward<T>& f, const Crew& crew) {
    using Tiles = AttentionTiles<T, WIDTH>;
    const AttentionProblem<T>& p = f.problem;
    const int kv_head = crew.part();
    const Task task = task_of(p, f.pieces, crew);
    if (task.idle) return;
    const Keys keys = task.keys;
    const int count = task.queries.count;

    const Units all(task.begin, kv_head, p.group), own(task.begin + crew.warp * kOwn, kv_head, p.group);
    const TileRange tiles = task.key_tiles(p, all, crew.rows(), Tiles::kOthers, f.pieces.split);
    const TileRange mine = task.key_tiles(p, own, kOwn, Tiles::kOthers, f.pieces.split);

    const MemoryParts parts = MemoryParts::of<T, WIDTH>(crew.warps, f.plan.stages, contents_of(p));
    const AttentionMemory<T, WIDTH> memory(crew, parts);
    start_own(memory.own[0], p.q, p.channels, task.queries, own);
    close_copies();
    Sight sight[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) sight[i] = p.masks.sight(own[lane_index() / 4 + i * 8].token, count, keys.count);

    Sums sums[WIDTH / 16];
    Running running;
    const float unit = unit_weight<T>(keys.count);
    each_tile(
        crew, tiles, f.plan.stages,
        [&](int tile, int stage) { start_keys(p, memory, crew.team, keys, kv_head, tile, stage); },
        [&](int tile, int stage) {
            if (!mine.holds(tile)) return;
            typename Tiles::Scores s;
            float factor[2];
            multiply_rows(s, memory.own[0], memory.others[2 * stage], p.channels);
            fold(p, s, sight, tile * Tiles::kOthers, unit, memory.scratch, running, factor);
            for_each(sums, [&](int half, int, float& x) { x *= factor[half]; });
            add_weighed(sums, s, memory.others[2 * stage + (p.v_is_k ? 0 : 1)], 0);
        });
    wait_copies<0>();
    crew.meet();
    stage(memory, sums, p.outer_scale);
    __syncwarp();
    finish(f, task, own, memory, running);
}

template <typename T, int WIDTH>
__global__ void __launch_bounds__(kMostWarps* kWarp, blocks_for<T>(WIDTH))
    attend(const __grid_constant__ Forward<T> f) {
    each_item<kStays<T, WIDTH>>(f.plan, [&](const Crew& crew) { attend_units<T, WIDTH>(f, crew); });
}

// ---------------------------------------------------------------- split rows

// Joins the chunks of split rows, a query under a head by a warp.
template <typename T>
__global__ void __launch_bounds__(kMostWarps* kWarp) merge_pieces(const __grid_constant__ Forward<T> f) {
    const AttentionProblem<T>& p = f.problem;
    const Joint joint = joint_of(p, f.pieces, int64_t{blockIdx.x} * kMostWarps + threadIdx.x / kWarp);
    if (joint.chunks == 0) return;
    const float* weights = f.pieces.weights;
    Total total{-INFINITY, 0.0f, unit_weight<T>(joint.keys)};
    if (p.score.softmax)
        for (int i = 0; i < joint.chunks; ++i) total.largest = fmaxf(total.largest, weights[2 * joint.at(i)]);
    const float base = total.largest == -INFINITY ? 0.0f : total.largest;
    const auto share = [&](int chunk) {
        return p.score.softmax ? exp2f((weights[2 * joint.at(chunk)] - base) * kLog2E) : 1.0f;
    };
    if (p.score.softmax)
        for (int i = 0; i < joint.chunks; ++i) total.sum += weights[2 * joint.at(i) + 1] * share(i);
    if (p.score.softmax) total.of_some_key();
    const OutputPlace place(p.queries_of(joint.row), joint.unit / p.heads, joint.unit % p.heads, p.heads, true);
    finish_query(f.epilogue, place, p.value_channels, total, [&](int c) {
        float sum = 0.0f;
        for (int i = 0; i < joint.chunks; ++i) sum += f.pieces.sums[joint.at(i) * p.value_channels + c] * share(i);
        return sum;
    });
}

// ---------------------------------------------------------------- launches

template <typename T, int WIDTH>
void start_attend(Forward<T>& f, const TensorView& queue, const Stream& stream) {
    const AttentionProblem<T>& p = f.problem;
    f.plan = plan_of<T, WIDTH>({p.mean_units(), p.mean_keys(), contents_of(p)});
    f.plan.slots = slots_of(p, f.pieces, p.rows(), f.plan.rows());
    f.plan.parts = p.kv_heads;
    start_query_crews<kStays<T, WIDTH>>(attend<T, WIDTH>, f, queue, stream);
}

}  // namespace

void attention_forward(const AttentionInputs& in, const AttentionOutputs& to, const AttentionPieces& pieces,
                       const TensorView& queue, bool tf32, const Stream& stream) {
    const Checks check = stream.checks();
    check_forward(check, in, to, pieces, queue);
    if (to.out.size() == 0) return;
    with_element(in.k.dtype, tf32, [&](auto element) {
        using T = decltype(element);
        Epilogue<T> epilogue{};
        epilogue.gating = in.gating;
        if (in.gate) epilogue.gate = Heads<const T>(*in.gate);
        if (to.residual) epilogue.residual = Heads<const T>(*to.residual);
        epilogue.out = static_cast<T*>(to.out.data);
        if (to.attn_out) epilogue.attn_out = static_cast<float*>(to.attn_out->data);
        if (to.lse) epilogue.lse = static_cast<float*>(to.lse->data);
        Forward<T> f{AttentionProblem<T>(in), epilogue, Pieces(pieces), {}};
        with_width(in, [&](auto width) { start_attend<T, width.value>(f, queue, stream); });
        join_chunks(merge_pieces<T>, f, stream);
    });
}

}  // namespace cuda
}  // namespace interformer
