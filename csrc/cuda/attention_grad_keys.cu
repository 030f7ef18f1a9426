// dK and dV of the attention kernels.
#include <climits>
#include <cstdint>

#include "cuda/attention_gradient.cuh"
#include "cuda/attention_plan.cuh"

namespace interformer {
namespace cuda {

namespace {

template <typename T>
struct KeyGradient : Gradient<T> {
    using Gradient<T>::Gradient;

    T *grad_k = nullptr, *grad_v = nullptr;  // where values are keys, grad_k is the sum of both
};

template <typename T>
__host__ __device__ Contents contents_of(const AttentionProblem<T>& p) {
    return {true, !p.score.softmax, true};
}

// Channels whose sums a warp can hold; wider heads are done in as many chunks as it takes.
template <int WIDTH>
constexpr int kChunk = WIDTH < 128 ? WIDTH : 128;

// As `blocks_for`: sums of dK and of dV take more registers.
constexpr int key_blocks_for(int width) {
    return width <= 32 ? 3 : 2;
}

// Key tokens of a row: 16 of this warp, from token `begin` on. Places in the row count behind the skipped ones.
struct OwnKeys {
    Span row;
    int begin, skip;
    bool held;  // by a row; else the tail

    // Whether queries may see token `begin + r`.
    __device__ bool is_key(int r) const { return held && begin + r < row.count && begin + r >= skip; }
    // Its place; no query sees one that is beyond all.
    __device__ int place(int r) const { return is_key(r) ? begin + r - skip : INT_MAX; }
    // Tiles of queries that see some of `rows` tokens from here on.
    template <typename T>
    __device__ TileRange query_tiles(const AttentionProblem<T>& p, const Queries& queries, int rows, int tile) const {
        const int first = begin - skip, last = min(begin + rows, row.count) - 1 - skip;
        if (!held || last < 0 || last < first) return {0, 0, 0};
        return p.masks.query_tiles(first, last, queries.count, row.count - skip, p.group, tile);
    }
};

// A tile of the units of a row's queries: their heads, those of the gradient of A, and their sides.
template <typename T, int WIDTH>
__device__ void start_queries(const KeyGradient<T>& g, const AttentionMemory<T, WIDTH>& memory, Team team,
                              const Queries& queries, int keys, int kv_head, int tile, int stage) {
    constexpr int kOthers = AttentionTiles<T, WIDTH>::kOthers;
    const AttentionProblem<T>& p = g.problem;
    const Units units(int64_t{tile} * kOthers, kv_head, p.group);
    const auto unit = [&](const Heads<const T>& from) {
        return [&](int r) {
            const Units::Unit u = units[r];
            return u.token < queries.count ? from.at(queries.row, queries.origin + u.token, u.head) : nullptr;
        };
    };
    start_tile(memory.others[2 * stage], p.channels, p.q.alignment, team, unit(p.q));
    start_tile(memory.others[2 * stage + 1], p.value_channels, g.grad.alignment, team, unit(g.grad));
    close_copies();
    if (team.index < kOthers) memory.sides[stage * kOthers + team.index] = g.side(queries, units[team.index], keys);
}

// Writes `sums` of the channels from `first` on to [tokens, heads, channels], by way of shared memory. Tokens that no
// query may see get zeros, whatever stands in tiles that they share with others: NaN by a weight of zero is NaN.
template <typename T, int WIDTH, int C>
__device__ void write_keys(T* to, const AttentionMemory<T, WIDTH>& memory, Sums (&sums)[C], float factor,
                           const OwnKeys& own, int kv_head, int kv_heads, int channels, int first) {
    stage(memory, sums, factor);
    __syncwarp();
#pragma unroll 1
    for (int r = 0; r < kOwn && own.begin + r < own.row.count; ++r) {
        T* row = to + ((own.row.first + own.begin + r) * kv_heads + kv_head) * channels + first;
        for (int c = lane_index(); c < min(channels - first, C * 16); c += kWarp)
            row[c] = narrow<T>(own.is_key(r) ? memory.staged[r * AttentionTiles<T, WIDTH>::kStaged + c] : 0.0f);
    }
    __syncwarp();
}

// 16 tokens by each warp, from all queries that see them; zero on the tail and on skipped tokens.
template <typename T, int WIDTH>
__device__ void grad_tokens(const KeyGradient<T>& g, const Crew& crew) {
    using Tiles = AttentionTiles<T, WIDTH>;
    constexpr int kOthers = Tiles::kOthers, kSums = kChunk<WIDTH> / 16, kChunks = WIDTH / kChunk<WIDTH>;
    const AttentionProblem<T>& p = g.problem;
    const int first = crew.part() % kChunks * kChunk<WIDTH>, kv_head = crew.part() / kChunks;
    const Slot slot = g.plan.queue.find(p.kv_offsets, crew.slot(), 1, crew.rows());
    if (slot.begin >= slot.span.count) return;
    const bool held = slot.span.row < p.kv_offsets.rows;
    const int begin = static_cast<int>(slot.begin), skip = p.skip;
    const OwnKeys all{slot.span, begin, skip, held}, own{slot.span, begin + crew.warp * kOwn, skip, held};
    const Queries queries = held ? p.queries_beside(slot.span) : Queries{};
    const TileRange tiles = all.query_tiles(p, queries, crew.rows(), kOthers);
    const TileRange mine = own.query_tiles(p, queries, kOwn, kOthers);

    const AttentionMemory<T, WIDTH> memory(crew, MemoryParts::of<T, WIDTH>(crew.warps, g.plan.stages, contents_of(p)));
    const auto token = [&](const Heads<const T>& from) {
        return [&](int r) { return own.is_key(r) ? from.at(0, slot.span.first + own.begin + r, kv_head) : nullptr; };
    };
    start_tile(memory.own[0], p.channels, p.k.alignment, warp_team(), token(p.k));
    if (!p.v_is_k) start_tile(memory.own[1], p.value_channels, p.v.alignment, warp_team(), token(p.v));
    close_copies();
    const int keys[2] = {own.place(lane_index() / 4), own.place(lane_index() / 4 + 8)};

    Sums sums_k[kSums], sums_v[kSums];
    each_tile(
        crew, tiles, g.plan.stages,
        [&](int tile, int stage) {
            start_queries(g, memory, crew.team, queries, slot.span.count - skip, kv_head, tile, stage);
        },
        [&](int tile, int stage) {
            if (!mine.holds(tile)) return;
            typename Tiles::Scores s, grad;
            multiply_rows(s, memory.own[0], memory.others[2 * stage], p.channels);
            multiply_rows(grad, memory.own[p.v_is_k ? 0 : 1], memory.others[2 * stage + 1], p.value_channels);
            const Side* sides = memory.sides + stage * kOthers;
            weigh(
                p, s, grad, memory.scratch, [&](int, int column) -> const Side& { return sides[column]; },
                [&](int half, int column) { return sides[column].sight.sees(keys[half]); });
            add_weighed(sums_v, s, memory.others[2 * stage + 1], first);
            add_weighed(sums_k, grad, memory.others[2 * stage], first);
        });
    wait_copies<0>();
    crew.meet();
    if (p.v_is_k) {
        for_each_pair(sums_k, sums_v, [&](int, int, float& x, float& y) { x = x * p.rest_scale + y; });
        write_keys(g.grad_k, memory, sums_k, p.outer_scale, own, kv_head, p.kv_heads, p.channels, first);
    } else {
        const float scale = p.rest_scale * p.outer_scale;
        write_keys(g.grad_k, memory, sums_k, scale, own, kv_head, p.kv_heads, p.channels, first);
        write_keys(g.grad_v, memory, sums_v, p.outer_scale, own, kv_head, p.kv_heads, p.value_channels, first);
    }
}

template <typename T, int WIDTH>
__global__ void __launch_bounds__(kMostWarps* kWarp, key_blocks_for(WIDTH))
    grad_keys(const __grid_constant__ KeyGradient<T> g) {
    each_item<kStays<T, WIDTH>>(g.plan, [&](const Crew& crew) { grad_tokens<T, WIDTH>(g, crew); });
}

template <typename T, int WIDTH>
void start_grad_keys(KeyGradient<T>& g, const TensorView& queue, const Stream& stream) {
    const AttentionProblem<T>& p = g.problem;
    g.plan = plan_of<T, WIDTH>({p.mean_keys(), p.mean_units(), contents_of(p)});
    g.plan.slots = slots(p.kv_offsets.tokens, p.rows(), 1, g.plan.rows());
    g.plan.parts = p.kv_heads * (WIDTH / kChunk<WIDTH>);
    // Other queries than packed ones are equally many in every row.
    start_crews<kStays<T, WIDTH>>(grad_keys<T, WIDTH>, g, p.kv_offsets, 1, p.layout == QueryLayout::packed, queue,
                                  stream);
}

}  // namespace

void keys_backward(const AttentionInputs& in, const TensorView& grad_attn_out, const AttentionGradients& grads,
                   const AttentionSides& sides, const TensorView& queue, bool tf32, const Stream& stream) {
    if (in.k.shape[0] == 0) return;
    with_element(in.k.dtype, tf32, [&](auto element) {
        using T = decltype(element);
        KeyGradient<T> g(in, grad_attn_out, sides);
        g.grad_k = static_cast<T*>(grads.grad_k.data);
        if (grads.grad_v) g.grad_v = static_cast<T*>(grads.grad_v->data);
        with_width(in, [&](auto width) { start_grad_keys<T, width.value>(g, queue, stream); });
    });
}

}  // namespace cuda
}  // namespace interformer
