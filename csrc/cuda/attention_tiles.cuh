// What the attention kernels have in common: the shared memory of warps that work together, and the passes over it.
//
// Each warp has 16 rows of its own: queries (forward, dQ) or keys (dK, dV). Step by step the rows that these meet, the
// others, come to shared memory, for one warp by itself or for all of a block. A warp passes over tiles that none of
// its rows see; so its bits do not depend on how many warps work together, or on the rows that the others have.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/attention_problem.cuh"
#include "cuda/crew.cuh"
#include "cuda/maps.cuh"
#include "cuda/tiles.cuh"

namespace interformer {
namespace cuda {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Tiles for heads of WIDTH channels at most.
template <typename T, int WIDTH>
struct AttentionTiles {
    static constexpr int kOthers = sizeof(T) == 2 || WIDTH <= 64 ? 32 : 16;
    static constexpr int kBlocks = kOthers / 16;
    static constexpr int kStaged = WIDTH + 8;  // numbers from row to row of finished sums: other banks

    using Own = Tile<T, kOwn, WIDTH>;
    using Other = Tile<T, kOthers, WIDTH>;
    using Scores = Sums[kBlocks];
};

// Blocks of kMostWarps warps that a multiprocessor shall hold: it bounds the registers of a thread to 128, 168 or 255.
// Exact products take more registers.
template <typename T>
constexpr int blocks_for(int width) {
    return width <= (std::is_same_v<T, float> ? 16 : 32) ? 4 : width <= 64 ? 3 : 2;
}

// ---------------------------------------------------------------- shared memory

// A query, as the backward meets it: what it sees, and, under softmax, its log-sum-exp, delta, and share, by which its
// weights are multiplied.
struct alignas(16) Side {
    Sight sight;
    float lse, delta, share;
    int padding[2];
};

// What a kernel keeps in shared memory beside tiles of others.
struct Contents {
    bool pairs;   // each warp has two tiles of its own, instead of one
    bool mapped;  // scores are mapped there
    bool sides;   // of the others
};

// Bytes of the parts of a crew's shared memory, in their order.
struct MemoryParts {
    int others, own, scratch, sides;

    template <typename T, int WIDTH>
    __host__ __device__ static constexpr MemoryParts of(int warps, int stages, const Contents& holds) {
        using Tiles = AttentionTiles<T, WIDTH>;
        return {2 * stages * Tiles::Other::kBytes, warps * (holds.pairs ? 2 : 1) * Tiles::Own::kBytes,
                holds.mapped ? warps * Tiles::kBlocks * 8 * kWarp * static_cast<int>(sizeof(float2)) : 0,
                holds.sides ? stages * Tiles::kOthers * static_cast<int>(sizeof(Side)) : 0};
    }
    constexpr int sum() const { return others + own + scratch + sides; }
};

// Tiles and numbers of one warp in its crew's shared memory.
template <typename T, int WIDTH>
struct AttentionMemory {
    using Tiles = AttentionTiles<T, WIDTH>;

    Stages<typename Tiles::Other, 4> others;  // the pair of stage `s` is 2 s and 2 s + 1
    Stages<typename Tiles::Own, 2> own;
    float2* scratch;  // of this lane
    Side* sides;
    float* staged;  // finished sums of this warp, where all the others were

    __device__ AttentionMemory(const Crew& crew, const MemoryParts& parts) {
        char* next = crew.memory;
        others.first.data = reinterpret_cast<T*>(next);
        next += parts.others;
        own.first.data = reinterpret_cast<T*>(next + crew.warp * (parts.own / crew.warps));
        next += parts.own;
        scratch = reinterpret_cast<float2*>(next + crew.warp * (parts.scratch / crew.warps)) + lane_index();
        next += parts.scratch;
        sides = reinterpret_cast<Side*>(next);
        staged = reinterpret_cast<float*>(crew.memory) + crew.warp * kOwn * Tiles::kStaged;
    }
};

// Calls `start(tile, stage)`, which starts copies and closes them, and `use(tile, stage)` for tiles in their order.
// What was started before, by the same threads, is there when the first tile is.
template <typename Start, typename Use>
__device__ inline void each_tile(const Crew& crew, const TileRange& tiles, int stages, Start&& start, Use&& use) {
    const int steps = tiles.count();
#pragma unroll 1
    for (int step = 1 - stages; step < steps; ++step) {
        // With two stages, this step's tile is there after the barrier, and the next one's stage is free.
        const int ahead = step + stages - 1;
        if (stages > 1 && step >= 0) wait_copies<0>();
        crew.meet();
        if (ahead < steps) start(tiles[ahead], ahead % stages);
        if (step < 0) continue;
        if (stages == 1) {
            wait_copies<0>();
            crew.meet();
        }
        use(tiles[step], step % stages);
    }
}

// ---------------------------------------------------------------- products

// Calls `each(half, column, number)` for what this lane has of blocks side by side.
template <int N, typename Each>
__device__ inline void for_each(Sums (&sums)[N], Each&& each) {
#pragma unroll
    for (int n = 0; n < N; ++n)
        sums[n].for_each_half([&](int half, int column, float& x) { each(half, n * 16 + column, x); });
}

// sums = own others', summed over channels. In float32 wide heads sum every 16 channels by themselves: a chain of 128
// products has twice the error, which shows in large scores.
template <int N, typename Own, typename Other>
__device__ inline void multiply_rows(Sums (&sums)[N], Own own, Other others, int channels) {
    using T = std::remove_pointer_t<decltype(Own::data)>;
#pragma unroll
    for (int n = 0; n < N; ++n) sums[n] = Sums{};
#pragma unroll 1
    for (int k = 0; k < channels; k += 16) {
        LeftOperand<T> left;
        load_left(left, own, 0, k);
#pragma unroll
        for (int n = 0; n < N; ++n) {
            RightOperand<T> right;
            load_right_turned(right, others, k, n * 16);
            if constexpr (std::is_same_v<T, float> && Own::kColumns > 64) {
                Sums part{};
                multiply_add(part, left, right);
                sums[n] += part;
            } else {
                multiply_add(sums[n], left, right);
            }
        }
    }
}

// sums += weights others, for the channels from `first` on.
template <int C, int N, typename Other>
__device__ inline void add_weighed(Sums (&sums)[C], const Sums (&weights)[N], Other others, int first) {
    using T = std::remove_pointer_t<decltype(Other::data)>;
#pragma unroll
    for (int n = 0; n < N; ++n) {
        LeftOperand<T> left;
        as_left(left, weights[n]);
#pragma unroll
        for (int c = 0; c < C; ++c) {
            RightOperand<T> right;
            load_right(right, others, n * 16, first + c * 16);
            multiply_add(sums[c], left, right);
        }
    }
}

// `map(s, grad)` for pairs of numbers of this lane, through its column of shared memory: so the map is in the code
// once, not once for each of the numbers.
template <int N, typename Map>
__device__ inline void map_one_by_one(Sums (&s)[N], Sums (&grad)[N], float2* scratch, Map&& map) {
#pragma unroll
    for (int i = 0; i < 8 * N; ++i)
        scratch[i * kWarp] = make_float2(s[i / 8].values[i / 4 % 2][i % 4], grad[i / 8].values[i / 4 % 2][i % 4]);
#pragma unroll 1
    for (int i = 0; i < 8 * N; ++i) {
        float2 pair = scratch[i * kWarp];
        map(pair.x, pair.y);
        scratch[i * kWarp] = pair;
    }
#pragma unroll
    for (int i = 0; i < 8 * N; ++i) {
        const float2 pair = scratch[i * kWarp];
        s[i / 8].values[i / 4 % 2][i % 4] = pair.x;
        grad[i / 8].values[i / 4 % 2][i % 4] = pair.y;
    }
}

// Finished sums, times `factor`, to shared memory, for the warp to read after `__syncwarp`.
template <typename T, int WIDTH, int C>
__device__ inline void stage(const AttentionMemory<T, WIDTH>& memory, Sums (&sums)[C], float factor) {
    float* first = memory.staged + lane_index() / 4 * AttentionTiles<T, WIDTH>::kStaged;
    for_each(sums, [&](int half, int column, float& x) {
        first[half * 8 * AttentionTiles<T, WIDTH>::kStaged + column] = x * factor;
    });
}

// ---------------------------------------------------------------- copies

// 16 units of a tensor of the queries' layout; zero where the row has no such token.
template <typename T, typename Own>
__device__ inline void start_own(Own to, const Heads<const T>& from, int channels, const Queries& row,
                                 const Units& units) {
    start_tile(to, channels, from.alignment, warp_team(), [&](int r) {
        const Units::Unit unit = units[r];
        return unit.token < row.count ? from.at(row.row, row.origin + unit.token, unit.head) : nullptr;
    });
}

// Tile `tile` of a row's keys and values, as the pair of a stage.
template <typename T, int WIDTH>
__device__ inline void start_keys(const AttentionProblem<T>& p, const AttentionMemory<T, WIDTH>& memory, Team team,
                                  const Keys& keys, int kv_head, int tile, int stage) {
    const auto key = [&](const Heads<const T>& from) {
        return [&, tile](int r) {
            const int j = tile * AttentionTiles<T, WIDTH>::kOthers + r;
            return j < keys.count ? from.at(0, keys.first + j, kv_head) : nullptr;
        };
    };
    start_tile(memory.others[2 * stage], p.channels, p.k.alignment, team, key(p.k));
    if (!p.v_is_k) start_tile(memory.others[2 * stage + 1], p.value_channels, p.v.alignment, team, key(p.v));
    close_copies();
}

}  // namespace cuda
}  // namespace interformer
