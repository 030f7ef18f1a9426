// dK and dV of the attention kernels.
#include <algorithm>
#include <climits>
#include <cstdint>
#include <type_traits>

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
    return {true, p.maps_in_memory(), true, p.options.any};
}

// Channels for which a warp can hold accumulators; wider heads take several channel chunks. Options take registers.
template <int WIDTH, bool OPTIONS>
constexpr int kChannelChunk = std::min(WIDTH, OPTIONS ? 64 : 128);

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
    // The warp's tokens, for their rotation; none of the tail.
    template <typename T>
    __device__ RotaryRows rotary(const AttentionProblem<T>& p) const {
        const int count = in_row ? min(row.count - begin, kStationary) : 0;
        return {p.rope, p.rope.positions_k, row.first, PackedRows(begin, 0, 1), 0, count};
    }
    // Tiles of queries that see some of the next `rows` tokens.
    template <typename RowMasks>
    __device__ auto query_tiles(const RowMasks& masks, int rows, int q_per_kv, int tile) const {
        const int first = begin - skip, last = min(begin + rows, row.count) - 1 - skip;
        using Tiling = decltype(masks.query_tiles(first, last, q_per_kv, tile));
        if (!in_row || last < 0 || last < first) return Tiling{};
        return masks.query_tiles(first, last, q_per_kv, tile);
    }
};

// Copies of the packed rows of a row of the batch: queries and the gradient of A.
template <typename T, int WIDTH>
__device__ PairCopy<T, WIDTH, false> copy_of_queries(const KeyArguments<T>& g, const AttentionMemory<T, WIDTH>& memory,
                                                     ThreadGroup threads, const Queries& queries, int kv_head) {
    const AttentionProblem<T>& p = g.problem;
    const auto source = [&](const Heads<const T>& from, int channels) {
        return packed_rows_of(from, channels, queries, kv_head, p.q_per_kv);
    };
    return {memory, threads, source(p.q, p.channels), source(g.grad_attn_out, p.value_channels), true};
}

// A gradient of keys or values, [tokens, heads, channels].
template <typename T>
struct KeyHeads {
    T* data;
    int kv_head, kv_heads, channels;
};

// Writes `acc`, times `scale`, for the channels from `first` on, by way of shared memory, where `rotate` may change it.
// Tokens that no query may see get zeros explicitly: a tile that they share with other tokens may hold NaN, and NaN
// times a probability of 0 is NaN.
template <typename T, int WIDTH, int C, typename Rotate>
__device__ void write_keys(const KeyHeads<T>& to, const AttentionMemory<T, WIDTH>& memory, AccTile (&acc)[C],
                           float scale, const StationaryKeys& keys, int first, Rotate&& rotate) {
    stage_results(memory, acc, scale);
    __syncwarp();
    rotate();
    const bool aligned = four_aligned(to.data, to.channels);
    const int channels = min(to.channels - first, C * 16);
    for_each_staged(memory, channels, [&](int r, int c, const Four& grads) {
        if (keys.begin + r >= keys.row.count) return;
        const int64_t token = keys.row.first + keys.begin + r;
        T* row = to.data + (token * to.kv_heads + to.kv_head) * to.channels + first;
        store_four(row + c, keys.is_key(r) ? grads : Four{}, channels - c, aligned);
    });
    __syncwarp();
}

// Writes dK and dV, or their sum where values are keys.
template <typename T, int WIDTH, int C>
__device__ void write_gradients(const KeyArguments<T>& g, const AttentionMemory<T, WIDTH>& memory, AccTile (&acc_k)[C],
                                AccTile (&acc_v)[C], const StationaryKeys& keys, int kv_head, int first) {
    const AttentionProblem<T>& p = g.problem;
    const KeyHeads<T> grad_k{g.grad_k, kv_head, p.kv_heads, p.channels};
    const auto as_it_is = [] {};
    if (p.v_is_k) {
        for_each_pair(acc_k, acc_v, [&](int, int, float& x, float& y) { x = x * p.grad_scale + y; });
        write_keys(grad_k, memory, acc_k, p.outer_scale, keys, first, as_it_is);
        return;
    }
    write_keys(grad_k, memory, acc_k, p.grad_scale * p.outer_scale, keys, first, [&] {
        if (p.rope.half > 0) rotate_back(memory, keys.rotary(p));
    });
    write_keys({g.grad_v, kv_head, p.kv_heads, p.value_channels}, memory, acc_v, p.outer_scale, keys, first, as_it_is);
}

// 16 tokens for each warp, over all queries that see them; zero on the tail and on skipped tokens.
template <typename T, int WIDTH, bool OPTIONS>
__device__ void grad_tile(const KeyArguments<T>& g, const TileGroup& group) {
    using Tiles = AttentionTiles<T, WIDTH>;
    constexpr int kStreamed = Tiles::kStreamed, kChunk = kChannelChunk<WIDTH, OPTIONS>, kChunks = WIDTH / kChunk;
    const AttentionProblem<T>& p = g.problem;
    const int first = group.index_in_slot() % kChunks * kChunk;
    const int kv_head = group.index_in_slot() / kChunks;
    const Slot slot = g.plan.scheduler.find(p.kv_offsets, group.slot(), 1, group.rows());
    if (slot.begin >= slot.span.count) return;
    const bool in_row = slot.span.row < p.kv_offsets.rows;
    const int begin = static_cast<int>(slot.begin), skip = p.skip;
    const StationaryKeys group_keys{slot.span, begin, skip, in_row};
    const StationaryKeys keys{slot.span, begin + group.warp * kStationary, skip, in_row};
    const Queries queries = in_row ? p.queries_beside(slot.span) : Queries{};
    const auto masks = p.template masks_of<OPTIONS>(queries, Keys{slot.span.first + skip, slot.span.count - skip});
    const auto tiles = group_keys.query_tiles(masks, group.rows(), p.q_per_kv, kStreamed);
    const auto warp_tiles = keys.query_tiles(masks, kStationary, p.q_per_kv, kStreamed);
    // Exact float32 products fill the registers: there every tile is masked, as it is with options.
    const int first_key = keys.begin - skip, last_key = first_key + kStationary - 1;
    const TileRange common = std::is_same_v<T, float> || OPTIONS
                                 ? TileRange{0, INT_MAX, INT_MAX}
                                 : p.variant.masks.common_query_tiles(first_key, last_key, queries.count,
                                                                      slot.span.count - skip, p.q_per_kv, kStreamed);

    const SharedLayout layout = SharedLayout::of<T, WIDTH>(group.warps, g.plan.stages, contents_of(p));
    const AttentionMemory<T, WIDTH> memory(group, layout);
    const auto copy_tokens = [&](int i, const Heads<const T>& from, int channels) {
        cp_async_tile(memory.stationary[i], tokens_of(from, channels, slot.span.first, kv_head), warp_threads(),
                      keys.begin, keys.row.count - keys.begin);
    };
    copy_tokens(0, p.k, p.channels);
    if (!p.v_is_k) copy_tokens(1, p.v, p.value_channels);
    cp_async_commit();
    if (p.rope.inside.keys) rotate_stationary(memory.stationary[0], keys.rotary(p));
    const int lane_keys[2] = {keys.key(lane_index() / 4), keys.key(lane_index() / 4 + 8)};

    const auto stats_of = [&](int stage) -> auto& {
        return reinterpret_cast<typename Tiles::template Stats<OPTIONS>*>(memory.query_stats)[stage];
    };
    AccTile acc_k[kChunk / 16], acc_v[kChunk / 16];
    const auto copy = copy_of_queries(g, memory, group.threads, queries, kv_head);
    const auto rows_from = [&](int64_t begin) {  // packed rows of the tile that begins there
        return static_cast<int>(min(int64_t{queries.count} * p.q_per_kv - begin, int64_t{kStreamed}));
    };
    for_each_tile(
        group, tiles, g.plan.stages,
        [&](int tile, int stage) {
            const int64_t begin = int64_t{tile} * kStreamed;
            copy.start_rows(stage, begin, rows_from(begin));
            const PackedRows rows(begin, kv_head, p.q_per_kv);
            const ThreadGroup threads = group.threads.reread();
            for (int r = threads.rank; r < kStreamed; r += threads.size)
                stats_of(stage).set(r, g.query_stats(masks, queries, rows[r]));
        },
        [&](int tile, int stage) {
            const int64_t begin = int64_t{tile} * kStreamed;
            if (p.rope.inside.queries)
                copy.rotate(stage, {p.rope, p.rope.positions_q, queries.origin, PackedRows(begin, 0, p.q_per_kv), 0,
                                    rows_from(begin)});
        },
        [&](int tile, int stage) {
            if (!warp_tiles.contains(tile)) return;
            const auto q = memory.streamed[2 * stage], grad = memory.streamed[2 * stage + 1];
            const int64_t begin = int64_t{tile} * kStreamed;
            const bool all_seen = common.contains(tile);
#pragma unroll 1
            for (int row = 0; row < rows_from(begin); row += Tiles::kPart) {
                typename Tiles::Scores s, d;
                multiply_rows(s, memory.stationary[0], q, row, p.channels);
                multiply_rows(d, memory.stationary[p.v_is_k ? 0 : 1], grad, row, p.value_channels);
                const ScoresByKey<kStreamed, KeysOf<OPTIONS>> at{stats_of(stage), row, lane_keys, all_seen};
                scores_backward(p, s, d, memory.scratch, places_of(at, PackedRows(begin, kv_head, p.q_per_kv), masks));
                multiply_accumulate(acc_v, s, grad, row, first);
                multiply_accumulate(acc_k, d, q, row, first);
            }
        });
    cp_async_wait<0>();
    group.sync();
    write_gradients(g, memory, acc_k, acc_v, keys, kv_head, first);
}

template <typename T, int WIDTH>
__global__ void __launch_bounds__(kMaxWarps* kWarp, key_blocks_for(WIDTH))
    grad_keys(const __grid_constant__ KeyArguments<T> g) {
    for_each_item<kPersistent<T, WIDTH>>(g.plan, [&](const TileGroup& group) { grad_tile<T, WIDTH, false>(g, group); });
}
template <typename T, int WIDTH>
__global__ void __launch_bounds__(kMaxWarps* kWarp, kOptionBlocks)
    grad_keys_with_options(const __grid_constant__ KeyArguments<T> g) {
    for_each_item<kPersistent<T, WIDTH>>(g.plan, [&](const TileGroup& group) { grad_tile<T, WIDTH, true>(g, group); });
}

template <typename T, int WIDTH>
void start_grad_keys(KeyArguments<T>& g, const Backward& call) {
    const AttentionProblem<T>& p = g.problem;
    g.plan = plan_of<T, WIDTH>({p.mean_keys(), p.mean_packed_rows(), contents_of(p)});
    g.plan.slots = slots(p.kv_offsets.tokens, p.rows(), 1, g.plan.rows());
    // Dense and shared queries are equally many in every row, so a tile of a longer row is no more work.
    const TiledRows rows{p.kv_offsets, 1, p.layout == QueryLayout::packed};
    void (*kernel)(KeyArguments<T>) = grad_keys<T, WIDTH>;
    int chunks = WIDTH / kChannelChunk<WIDTH, false>;
    if constexpr (kServesOptions<WIDTH>) {
        if (p.options.any) kernel = grad_keys_with_options<T, WIDTH>, chunks = WIDTH / kChannelChunk<WIDTH, true>;
    }
    g.plan.items_per_slot = p.kv_heads * chunks;
    start_tile_groups<kPersistent<T, WIDTH>>(kernel, g, rows, call.workspace.scheduler, call.stream);
}

}  // namespace

void keys_backward(const Backward& call) {
    if (call.in.k.shape[0] == 0) return;
    with_element(call.in.k.dtype, call.tf32, [&](auto element) {
        using T = decltype(element);
        KeyArguments<T> g(call);
        g.grad_k = static_cast<T*>(call.grads.grad_k.data);
        if (call.grads.grad_v) g.grad_v = static_cast<T*>(call.grads.grad_v->data);
        with_width(call.in, g.problem.options, [&](auto width) { start_grad_keys<T, width.value>(g, call); });
    });
}

}  // namespace cuda
}  // namespace interformer
