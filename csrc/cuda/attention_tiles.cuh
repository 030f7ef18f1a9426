// Common to the attention kernels: the shared memory of a tile group, and the passes over it.
//
// Each warp has 16 stationary rows: queries (forward, dQ) or keys (dK, dV). Tiles of the rows on the other side are
// streamed through shared memory, for each warp by itself or for all warps of a block. A warp skips tiles that none of
// its rows see, so its bits do not depend on how many warps work together, nor on the rows of other warps.
#pragma once

#include <climits>
#include <cstdint>
#include <type_traits>

#include "cuda/attention_problem.cuh"
#include "cuda/tile_copy.cuh"
#include "cuda/tile_group.cuh"
#include "cuda/tiles.cuh"
#include "cuda/vectors.cuh"

namespace interformer {
namespace cuda {

// Tiles for heads of at most WIDTH channels.
template <typename T, int WIDTH>
struct AttentionTiles {
    // Rows of a streamed tile, and of its parts whose scores are computed together in the backward.
    static constexpr int kStreamed = sizeof(T) == 2 && WIDTH <= 64 ? 64 : sizeof(T) == 2 || WIDTH <= 64 ? 32 : 16;
    static constexpr int kPart = kStreamed < 32 ? kStreamed : 32;
    static constexpr int kBlocks = kPart / 16;
    static constexpr int kStaged = WIDTH + 8;  // stride of staged results, padded against bank conflicts

    using Stationary = Tile<T, kStationary, WIDTH>;
    using Streamed = Tile<T, kStreamed, WIDTH>;
    using Scores = AccTile[kBlocks];
    template <bool OPTIONS>
    using Stats = StreamedStats<kStreamed, KeysOf<OPTIONS>>;
};

// Blocks of kMaxWarps warps that a multiprocessor shall hold: it bounds the registers of a thread to 128, 168 or 255.
constexpr int blocks_for(int width) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
    constexpr int kNarrow = 3;  // four spill there
#else
    constexpr int kNarrow = 4;
#endif
    return width <= 16 ? kNarrow : width <= 64 ? 3 : 2;
}

// ---------------------------------------------------------------- shared memory

// Contents of a tile group's shared memory beside streamed tiles.
struct Contents {
    bool pairs;        // each warp has two stationary tiles instead of one
    bool pointwise;    // scores are mapped in shared memory
    bool query_stats;  // queries are streamed, and their statistics with them
    bool options;      // the call has options
};

// Bytes of the sections of a tile group's shared memory, in their order.
struct SharedLayout {
    int streamed, stationary, scratch, query_stats;

    template <typename T, int WIDTH>
    __host__ __device__ static constexpr SharedLayout of(int warps, int stages, const Contents& contents) {
        using Tiles = AttentionTiles<T, WIDTH>;
        return {2 * stages * Tiles::Streamed::kBytes, warps * (contents.pairs ? 2 : 1) * Tiles::Stationary::kBytes,
                contents.pointwise ? warps * Tiles::kBlocks * 8 * kWarp * static_cast<int>(sizeof(float2)) : 0,
                contents.query_stats ? stages * stats_bytes<T, WIDTH>(contents.options) : 0};
    }
    template <typename T, int WIDTH>
    __host__ __device__ static constexpr int stats_bytes(bool options) {
        using Tiles = AttentionTiles<T, WIDTH>;
        return static_cast<int>(options ? sizeof(typename Tiles::template Stats<true>)
                                        : sizeof(typename Tiles::template Stats<false>));
    }
    constexpr int bytes() const { return streamed + stationary + scratch + query_stats; }
};

// Tiles and numbers of one warp in its tile group's shared memory.
template <typename T, int WIDTH>
struct AttentionMemory {
    using Tiles = AttentionTiles<T, WIDTH>;

    Stages<typename Tiles::Streamed, 4> streamed;  // the pair of stage `s` is 2 s and 2 s + 1
    Stages<typename Tiles::Stationary, 2> stationary;
    float2* scratch;    // column of this lane
    char* query_stats;  // by stage
    float* staged;      // results of this warp; they overlay the streamed and stationary tiles

    __device__ AttentionMemory(const TileGroup& group, const SharedLayout& layout) {
        char* next = group.memory;
        streamed.first.data = reinterpret_cast<T*>(next);
        next += layout.streamed;
        stationary.first.data = reinterpret_cast<T*>(next + group.warp * (layout.stationary / group.warps));
        next += layout.stationary;
        scratch = reinterpret_cast<float2*>(next + group.warp * (layout.scratch / group.warps)) + lane_index();
        next += layout.scratch;
        query_stats = next;
        staged = reinterpret_cast<float*>(group.memory) + group.warp * kStationary * Tiles::kStaged;
    }
};

// Calls `start(tile, stage)`, which starts and commits copies, `land(tile, stage)` once those of the calling thread
// have landed, and `use(tile, stage)` once those of all threads have, for the tiles in their order. Copies that the
// same threads committed before have landed with the first tile.
template <typename Tiling, typename Start, typename Land, typename Use>
__device__ inline void for_each_tile(const TileGroup& group, const Tiling& tiles, int stages, Start&& start,
                                     Land&& land, Use&& use) {
    const int steps = tiles.count(), stage_bits = stages - 1;  // one or two stages: no division
#pragma unroll 1
    for (int step = 1 - stages; step < steps; ++step) {
        // With two stages, this step's tile has landed after the barrier, and the next one's stage is free.
        const int ahead = step + stages - 1;
        if (stages > 1 && step >= 0) {
            cp_async_wait<0>();
            land(tiles[step], step & stage_bits);
        }
        group.sync();
        if (ahead < steps) start(tiles[ahead], ahead & stage_bits);
        if (step < 0) continue;
        if (stages == 1) {
            cp_async_wait<0>();
            land(tiles[step], 0);
            group.sync();
        }
        use(tiles[step], step & stage_bits);
    }
}

// ---------------------------------------------------------------- products

// acc = stationary * streamed', summed over channels, for the streamed rows from `row` on. In float32, wide heads sum
// every 16 channels by themselves: a chain of 128 products has twice the error, which shows in large scores. In 16
// bits, several steps of 16 channels are unrolled where registers allow it; channels behind the last one are zeros.
template <int N, typename Stationary, typename Streamed>
__device__ inline void multiply_rows(AccTile (&acc)[N], Stationary stationary, Streamed streamed, int row,
                                     int channels) {
    using T = std::remove_pointer_t<decltype(Stationary::data)>;
    constexpr int kColumns = Stationary::kColumns;
    constexpr int kStep = sizeof(T) == 4 ? 16 : kColumns <= 64 ? kColumns : kColumns <= 128 ? 32 : 16;
#pragma unroll
    for (int n = 0; n < N; ++n) acc[n] = AccTile{};
#pragma unroll 1
    for (int begin = 0; begin < (kStep == kColumns ? kColumns : channels); begin += kStep) {
#pragma unroll
        for (int k = begin; k < begin + kStep; k += 16) {
            LeftOperand<T> left;
            load_left(left, stationary, 0, k);
#pragma unroll
            for (int n = 0; n < N; ++n) {
                RightOperand<T> right;
                load_right_transposed(right, streamed, k, row + n * 16);
                if constexpr (std::is_same_v<T, float> && kColumns > 64) {
                    AccTile sum{};
                    mma(sum, left, right);
                    acc[n] += sum;
                } else {
                    mma(acc[n], left, right);
                }
            }
        }
    }
}

// acc += left * streamed, for the streamed rows from `row` and the channels from `first` on. `left` is P or dS.
template <int C, int N, typename Streamed>
__device__ inline void multiply_accumulate(AccTile (&acc)[C], const AccTile (&left)[N], Streamed streamed, int row,
                                           int first) {
    using T = std::remove_pointer_t<decltype(Streamed::data)>;
#pragma unroll
    for (int n = 0; n < N; ++n) {
        LeftOperand<T> operand;
        as_left_operand(operand, left[n]);
#pragma unroll
        for (int c = 0; c < C; ++c) {
            RightOperand<T> right;
            load_right(right, streamed, row + n * 16, first + c * 16);
            mma(acc[c], operand, right);
        }
    }
}

// Writes results, times `scale`, to shared memory, where the warp reads them after `__syncwarp`. Pairs of numbers:
// single ones would share banks.
template <typename T, int WIDTH, int C>
__device__ inline void stage_results(const AttentionMemory<T, WIDTH>& memory, const AccTile (&acc)[C], float scale) {
    constexpr int kStaged = AttentionTiles<T, WIDTH>::kStaged;
    float* first = memory.staged + lane_index() / 4 * kStaged + lane_index() % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4 * C; ++i) {
        const float* pair = acc[i / 4].values[i / 2 % 2] + i % 2 * 2;
        *reinterpret_cast<float2*>(first + i % 2 * 8 * kStaged + i / 2 * 8) = {pair[0] * scale, pair[1] * scale};
    }
}

// Calls `each(row, channel, numbers)` for the four numbers at every fourth of the first `channels` channels of a warp's
// staged results. Neighbouring lanes have neighbouring numbers, and narrow heads several rows at once.
template <typename T, int WIDTH, typename Each>
__device__ inline void for_each_staged(const AttentionMemory<T, WIDTH>& memory, int channels, Each&& each) {
    constexpr int kAcross = WIDTH / 4 < kWarp ? WIDTH / 4 : kWarp, kRows = kWarp / kAcross;
#pragma unroll 1
    for (int row = lane_index() / kAcross; row < kStationary; row += kRows)
#pragma unroll 1
        for (int c = lane_index() % kAcross * 4; c < channels; c += kAcross * 4) {
            const float* staged = memory.staged + row * AttentionTiles<T, WIDTH>::kStaged + c;
            const float4 four = *reinterpret_cast<const float4*>(staged);
            each(row, c, Four{four.x, four.y, four.z, four.w});
        }
}

// ---------------------------------------------------------------- copies

// The packed rows of one row of the batch, in a tensor of the queries' layout.
template <typename T>
__device__ inline RowSource<T> packed_rows_of(const Heads<const T>& from, int channels, const Queries& queries,
                                              int kv_head, int q_per_kv) {
    const T* data = from.at(queries.row, queries.origin, int64_t{kv_head} * q_per_kv);
    return {data, from.token, channels, from.alignment, from.head, q_per_kv};
}

// The key tokens of a row under one head.
template <typename T>
__device__ inline RowSource<T> tokens_of(const Heads<const T>& from, int channels, int64_t first, int kv_head) {
    return {from.at(0, first, kv_head), from.token, channels, from.alignment};
}

// Rotates rows that this warp has copied, once the copies of the calling lane have landed.
template <typename Tile>
__device__ inline void rotate_tile(Tile tile, const RotaryRows& rows) {
    // Wider heads have no rotation in their code: dK and dV of 128 channels have no registers for one on sm_80.
    if constexpr (Tile::kColumns <= kWidestRope) {
        __syncwarp();  // those of the other lanes have landed, too
        rows.rotate<Tile::kColumns>(tile.data, Tile::kStride, 1.0f);
    }
}

// Waits for a warp's stationary tile, and rotates it. To do so beside the first streamed tile would hide the wait, but
// takes registers that kernels lack.
template <typename Stationary>
__device__ inline void rotate_stationary(Stationary tile, const RotaryRows& rows) {
    if constexpr (Stationary::kColumns <= kWidestRope) {
        cp_async_wait<0>();
        rotate_tile(tile, rows);
    }
}

// Rotates a warp's staged results back, in the numbers themselves.
template <typename T, int WIDTH>
__device__ inline void rotate_back(const AttentionMemory<T, WIDTH>& memory, const RotaryRows& rows) {
    if constexpr (WIDTH <= kWidestRope) {
        rows.rotate<WIDTH>(memory.staged, AttentionTiles<T, WIDTH>::kStaged, -1.0f);
        __syncwarp();
    }
}

// 16 packed rows of a tensor of the queries' layout; zero where the row has no such token.
template <typename T, typename Stationary>
__device__ inline void cp_async_stationary(Stationary to, const Heads<const T>& from, int channels,
                                           const Queries& queries, const PackedRows& packed_rows) {
    const int kv_head = packed_rows.head / packed_rows.q_per_kv;
    const int64_t begin = packed_rows.begin(), count = int64_t{queries.count} * packed_rows.q_per_kv - begin;
    cp_async_tile(to, packed_rows_of(from, channels, queries, kv_head, packed_rows.q_per_kv), warp_threads(), begin,
                  static_cast<int>(min(count, int64_t{kStationary})));
}

// Copies of pairs of streamed tiles from two sources of the same rows; without a second one, of the first tile alone.
template <typename T, int WIDTH, bool KEEP>
class PairCopy {
    using Copy = TileCopy<typename AttentionTiles<T, WIDTH>::Streamed>;

  public:
    __device__ PairCopy(const AttentionMemory<T, WIDTH>& memory, ThreadGroup threads, const RowSource<T>& left,
                        const RowSource<T>& right, bool has_right)
        : memory_(memory),
          threads_(threads),
          left_(left),
          right_(right),
          left_copy_(left, threads),
          right_copy_(right, threads),
          has_right_(has_right),
          together_(has_right && Copy::are_pair(left, right)),
          inner_(together_ ? Copy::inner_rows(left, right) : INT_MAX) {
        if constexpr (KEEP) {
            left_copy_.keep();
            right_copy_.keep();
            inner_ = opaque(inner_);
        }
    }

    // Starts and commits copies of tile `tile`, of which `count` rows are there, into the pair of a stage. Where KEEP,
    // addresses stay in registers from tile to tile, and both sources are copied together.
    __device__ void start(int stage, int tile, int count) const {
        const int64_t first = int64_t{tile} * AttentionTiles<T, WIDTH>::kStreamed;
        if constexpr (!KEEP) return start_rows(stage, first, count);
        if (count >= inner_) {
            Copy::template start_pair<false>(memory_.streamed[2 * stage], tile, count, left_copy_, right_copy_);
        } else if (together_) {
            Copy::template start_pair<true>(memory_.streamed[2 * stage], tile, count, left_copy_, right_copy_);
        } else {
            left_copy_.start(memory_.streamed[2 * stage], first, count);
            if (has_right_) right_copy_.start(memory_.streamed[2 * stage + 1], first, count);
        }
        cp_async_commit();
    }
    // Starts and commits copies of rows [first, first + count). No address stays in a register.
    __device__ void start_rows(int stage, int64_t first, int count) const {
        const ThreadGroup threads = threads_.reread();
        Copy(left_, threads).start(memory_.streamed[2 * stage], first, count);
        if (has_right_) Copy(right_, threads).start(memory_.streamed[2 * stage + 1], first, count);
        cp_async_commit();
    }

    // Rotates the first tile of a stage, once the copies of this thread have landed. Each warp rotates the rows that it
    // has copied.
    __device__ void rotate(int stage, RotaryRows rows) const {
        if constexpr (WIDTH <= kWidestRope) {
            const int strip = Copy::strip_rows(threads_), begin = threads_.reread().rank / kWarp * strip;
            rows.begin = max(rows.begin, begin);
            rows.end = min(rows.end, begin + strip);
            rotate_tile(memory_.streamed[2 * stage], rows);
        }
    }

  private:
    const AttentionMemory<T, WIDTH>& memory_;
    ThreadGroup threads_;
    RowSource<T> left_, right_;
    Copy left_copy_, right_copy_;
    bool has_right_, together_;
    int inner_;  // rows of a pair without an edge
};

// Copies of a row's keys and values.
template <bool KEEP, typename T, int WIDTH>
__device__ inline PairCopy<T, WIDTH, KEEP> copy_of_keys(const AttentionProblem<T>& p,
                                                        const AttentionMemory<T, WIDTH>& memory, ThreadGroup threads,
                                                        const Keys& keys, int kv_head) {
    return {memory, threads, tokens_of(p.k, p.channels, keys.first, kv_head),
            tokens_of(p.v, p.value_channels, keys.first, kv_head), !p.v_is_k};
}

// The packed rows of a warp, for their rotation.
template <typename T>
__device__ inline RotaryRows rotary_queries(const AttentionProblem<T>& p, const Queries& queries,
                                            const PackedRows& rows) {
    const int64_t count = int64_t{queries.count} * p.q_per_kv - rows.begin();
    return {p.rope, p.rope.positions_q, queries.origin, rows, 0, static_cast<int>(min(count, int64_t{kStationary}))};
}

// Rotates a tile of keys, once this thread's copies have landed, if they were not rotated before.
template <typename T, int WIDTH, bool KEEP>
__device__ inline void rotate_keys(const AttentionProblem<T>& p, const PairCopy<T, WIDTH, KEEP>& copy, const Keys& keys,
                                   int tile, int stage) {
    const int first = tile * AttentionTiles<T, WIDTH>::kStreamed;
    if (p.rope.inside.keys)
        copy.rotate(stage, {p.rope, p.rope.positions_k, keys.first, PackedRows(first, 0, 1), 0, keys.count - first});
}

// For each tile of keys that a warp's queries see, the products of its scores and of dA with the values, part by part:
// `use(scores, d_probs, places, row, stage)`, where the part begins at row `row` of the tile. Queries and dA are the
// stationary tiles.
template <typename T, int WIDTH, typename Tiling, typename OneQuery, typename Use>
__device__ inline void for_each_key_tile(const AttentionProblem<T>& p, const TileGroup& group,
                                         const AttentionMemory<T, WIDTH>& memory, int stages, const Tiling& tiles,
                                         const Tiling& warp_tiles, const Keys& keys, int kv_head,
                                         const LaneQueries<OneQuery>& queries, Use&& use) {
    using Tiles = AttentionTiles<T, WIDTH>;
    const auto copy = copy_of_keys<false>(p, memory, group.threads, keys, kv_head);
    for_each_tile(
        group, tiles, stages,
        [&](int tile, int stage) { copy.start(stage, tile, keys.count - tile * Tiles::kStreamed); },
        [&](int tile, int stage) { rotate_keys(p, copy, keys, tile, stage); },
        [&](int tile, int stage) {
            if (!warp_tiles.contains(tile)) return;
            const int first = tile * Tiles::kStreamed;
#pragma unroll 1
            for (int row = 0; row < min(keys.count - first, Tiles::kStreamed); row += Tiles::kPart) {
                typename Tiles::Scores s, d;
                multiply_rows(s, memory.stationary[0], memory.streamed[2 * stage], row, p.channels);
                multiply_rows(d, memory.stationary[1], memory.streamed[2 * stage + (p.v_is_k ? 0 : 1)], row,
                              p.value_channels);
                use(s, d, queries.scores(first + row, Tiles::kPart), row, stage);
            }
        });
}

// Keys that all 16 packed rows of a warp see. Exact float32 products fill the registers: there none but the prefix
// count, and most tiles are masked.
template <typename T, typename RowMasks>
__device__ inline auto common_range(const RowMasks& masks, const PackedRows& rows) {
    auto common = masks.common_range(rows.token, rows[kStationary - 1].token);
    if constexpr (std::is_same_v<T, float>) common.from = INT32_MAX, common.to = 0;
    return common;
}

}  // namespace cuda
}  // namespace interformer
