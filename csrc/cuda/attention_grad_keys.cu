// dK and dV of the attention kernels.
#include <climits>
#include <cstdint>

#include "cuda/attention_gradient.cuh"
#include "cuda/attention_plan.cuh"

namespace interformer {
namespace cuda {

namespace {

template <typename T>
struct KeyArguments : BackwardArguments<T> {
    using BackwardArguments<T>::BackwardArguments;

    T *grad_k = nullptr, *grad_v = nullptr;  // where values are keys, `grad_k` is the sum of both
};

template <typename T>
__host__ __device__ Contents contents_of(const AttentionProblem<T>& p) {
    return {true, !p.variant.kind.softmax, true};
}

// Channels for which a warp can hold accumulators; wider heads take several channel chunks.
template <int WIDTH>
constexpr int kChannelChunk = WIDTH < 128 ? WIDTH : 128;

// As `blocks_for`: accumulators of dK and of dV take more registers.
constexpr int key_blocks_for(int width) {
    return width <= 32 ? 3 : 2;
}

// Key tokens of a row, from token `begin` on. Keys are numbered behind the skipped tokens.
struct StationaryKeys {
    Span row;
    int begin, skip;
    bool in_row;  // else these tokens are of the tail

    // Whether queries may see token `begin + r`.
    __device__ bool is_key(int r) const { return in_row && begin + r < row.count && begin + r >= skip; }
    // The number of the key, or one that no query sees.
    __device__ int key(int r) const { return is_key(r) ? begin + r - skip : INT_MAX; }
    // Tiles of queries that see some of the next `rows` tokens.
    template <typename T>
    __device__ TileRange query_tiles(const AttentionProblem<T>& p, const Queries& queries, int rows, int tile) const {
        const int first = begin - skip, last = min(begin + rows, row.count) - 1 - skip;
        if (!in_row || last < 0 || last < first) return {0, 0, 0};
        return p.variant.masks.query_tiles(first, last, queries.count, row.count - skip, p.q_per_kv, tile);
    }
};

// Starts copies of a tile of packed rows: queries and the gradient of A. Writes their statistics.
template <typename T, int WIDTH>
__device__ void cp_async_queries(const KeyArguments<T>& g, const AttentionMemory<T, WIDTH>& memory, ThreadGroup threads,
                                 const Queries& queries, int keys, int kv_head, int tile, int stage) {
    constexpr int kStreamed = AttentionTiles<T, WIDTH>::kStreamed;
    const AttentionProblem<T>& p = g.problem;
    const int64_t first = int64_t{tile} * kStreamed, count = int64_t{queries.count} * p.q_per_kv - first;
    const auto source = [&](const Heads<const T>& from, int channels) {
        return packed_rows_of(from, channels, queries, kv_head, p.q_per_kv);
    };
    cp_async_pair(memory.streamed, stage, threads, source(p.q, p.channels), source(g.grad_attn_out, p.value_channels),
                  true, first, static_cast<int>(min(count, int64_t{kStreamed})));
    if (threads.rank >= kStreamed) return;
    const PackedRow row = PackedRows(first, kv_head, p.q_per_kv)[threads.rank];
    memory.query_stats[stage * kStreamed + threads.rank] = g.query_stats(queries, row, keys);
}

// A gradient of keys or values, [tokens, heads, channels].
template <typename T>
struct KeyHeads {
    T* data;
    int kv_head, kv_heads, channels;
};

// Writes `acc`, times `scale`, for the channels from `first` on, by way of shared memory. Tokens that no query may see
// get zeros explicitly: a tile that they share with other tokens may hold NaN, and NaN times a probability of 0 is NaN.
template <typename T, int WIDTH, int C>
__device__ void write_keys(const KeyHeads<T>& to, const AttentionMemory<T, WIDTH>& memory, AccTile (&acc)[C],
                           float scale, const StationaryKeys& keys, int first) {
    stage_results(memory, acc, scale);
    __syncwarp();
#pragma unroll 1
    for (int r = 0; r < kStationary && keys.begin + r < keys.row.count; ++r) {
        T* row = to.data + ((keys.row.first + keys.begin + r) * to.kv_heads + to.kv_head) * to.channels + first;
        for (int c = lane_index(); c < min(to.channels - first, C * 16); c += kWarp)
            row[c] = narrow<T>(keys.is_key(r) ? memory.staged[r * AttentionTiles<T, WIDTH>::kStaged + c] : 0.0f);
    }
    __syncwarp();
}

// Writes dK and dV, or their sum where values are keys.
template <typename T, int WIDTH, int C>
__device__ void write_gradients(const KeyArguments<T>& g, const AttentionMemory<T, WIDTH>& memory, AccTile (&acc_k)[C],
                                AccTile (&acc_v)[C], const StationaryKeys& keys, int kv_head, int first) {
    const AttentionProblem<T>& p = g.problem;
    const KeyHeads<T> grad_k{g.grad_k, kv_head, p.kv_heads, p.channels};
    if (p.v_is_k) {
        for_each_pair(acc_k, acc_v, [&](int, int, float& x, float& y) { x = x * p.grad_scale + y; });
        write_keys(grad_k, memory, acc_k, p.outer_scale, keys, first);
        return;
    }
    write_keys(grad_k, memory, acc_k, p.grad_scale * p.outer_scale, keys, first);
    write_keys({g.grad_v, kv_head, p.kv_heads, p.value_channels}, memory, acc_v, p.outer_scale, keys, first);
}

// 16 tokens for each warp, over all queries that see them; zero on the tail and on skipped tokens.
template <typename T, int WIDTH>
__device__ void grad_tile(const KeyArguments<T>& g, const TileGroup& group) {
    using Tiles = AttentionTiles<T, WIDTH>;
    constexpr int kStreamed = Tiles::kStreamed, kChannelChunks = WIDTH / kChannelChunk<WIDTH>;
    const AttentionProblem<T>& p = g.problem;
    const int first = group.index_in_slot() % kChannelChunks * kChannelChunk<WIDTH>;
    const int kv_head = group.index_in_slot() / kChannelChunks;
    const Slot slot = g.plan.scheduler.find(p.kv_offsets, group.slot(), 1, group.rows());
    if (slot.begin >= slot.span.count) return;
    const bool in_row = slot.span.row < p.kv_offsets.rows;
    const int begin = static_cast<int>(slot.begin), skip = p.skip;
    const StationaryKeys group_keys{slot.span, begin, skip, in_row};
    const StationaryKeys keys{slot.span, begin + group.warp * kStationary, skip, in_row};
    const Queries queries = in_row ? p.queries_beside(slot.span) : Queries{};
    const TileRange tiles = group_keys.query_tiles(p, queries, group.rows(), kStreamed);
    const TileRange warp_tiles = keys.query_tiles(p, queries, kStationary, kStreamed);

    const SharedLayout layout = SharedLayout::of<T, WIDTH>(group.warps, g.plan.stages, contents_of(p));
    const AttentionMemory<T, WIDTH> memory(group, layout);
    const auto copy_tokens = [&](int i, const Heads<const T>& from, int channels) {
        cp_async_tile(memory.stationary[i], tokens_of(from, channels, slot.span.first, kv_head), warp_threads(),
                      keys.begin, keys.row.count - keys.begin);
    };
    copy_tokens(0, p.k, p.channels);
    if (!p.v_is_k) copy_tokens(1, p.v, p.value_channels);
    cp_async_commit();
    const int lane_keys[2] = {keys.key(lane_index() / 4), keys.key(lane_index() / 4 + 8)};

    AccTile acc_k[kChannelChunk<WIDTH> / 16], acc_v[kChannelChunk<WIDTH> / 16];
    for_each_tile(
        group, tiles, g.plan.stages,
        [&](int tile, int stage) {
            cp_async_queries(g, memory, group.threads, queries, slot.span.count - skip, kv_head, tile, stage);
        },
        [&](int tile, int stage) {
            if (!warp_tiles.contains(tile)) return;
            typename Tiles::Scores s, d;
            multiply_rows(s, memory.stationary[0], memory.streamed[2 * stage], p.channels);
            multiply_rows(d, memory.stationary[p.v_is_k ? 0 : 1], memory.streamed[2 * stage + 1], p.value_channels);
            const ScoresByKey at{memory.query_stats + stage * kStreamed, lane_keys};
            scores_backward(p.variant, s, d, memory.scratch, at);
            multiply_accumulate(acc_v, s, memory.streamed[2 * stage + 1], first);
            multiply_accumulate(acc_k, d, memory.streamed[2 * stage], first);
        });
    cp_async_wait<0>();
    group.sync();
    write_gradients(g, memory, acc_k, acc_v, keys, kv_head, first);
}

template <typename T, int WIDTH>
__global__ void __launch_bounds__(kMaxWarps* kWarp, key_blocks_for(WIDTH))
    grad_keys(const __grid_constant__ KeyArguments<T> g) {
    for_each_item<kPersistent<T, WIDTH>>(g.plan, [&](const TileGroup& group) { grad_tile<T, WIDTH>(g, group); });
}

template <typename T, int WIDTH>
void start_grad_keys(KeyArguments<T>& g, const Backward& call) {
    const AttentionProblem<T>& p = g.problem;
    g.plan = plan_of<T, WIDTH>({p.mean_keys(), p.mean_packed_rows(), contents_of(p)});
    g.plan.slots = slots(p.kv_offsets.tokens, p.rows(), 1, g.plan.rows());
    g.plan.items_per_slot = p.kv_heads * (WIDTH / kChannelChunk<WIDTH>);
    // Dense and shared queries are equally many in every row, so a tile of a longer row is no more work.
    const TiledRows rows{p.kv_offsets, 1, p.layout == QueryLayout::packed};
    start_tile_groups<kPersistent<T, WIDTH>>(grad_keys<T, WIDTH>, g, rows, call.workspace.scheduler, call.stream);
}

}  // namespace

void keys_backward(const Backward& call) {
    if (call.in.k.shape[0] == 0) return;
    with_element(call.in.k.dtype, call.tf32, [&](auto element) {
        using T = decltype(element);
        KeyArguments<T> g(call);
        g.grad_k = static_cast<T*>(call.grads.grad_k.data);
        if (call.grads.grad_v) g.grad_v = static_cast<T*>(call.grads.grad_v->data);
        with_width(call.in, [&](auto width) { start_grad_keys<T, width.value>(g, call); });
    });
}

}  // namespace cuda
}  // namespace interformer
