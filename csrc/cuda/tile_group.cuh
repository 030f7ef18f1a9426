// Tile groups: the warps of a launch that work together on a tile, and the work items that they do one after another.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/instructions.cuh"
#include "cuda/tile_scheduler.cuh"
#include "cuda/tiles.cuh"

namespace interformer {
namespace cuda {

constexpr int kStationary = 16;  // stationary rows of a warp

// How a launch divides its work. An item is the work of a tile group at one time: a slot under one key/value head, and
// for one channel chunk.
struct Plan {
    int64_t slots;
    int items_per_slot;
    int warps;           // warps of a block
    bool warp_per_tile;  // each warp is a tile group; else a block is
    int stages;          // streamed tiles in shared memory
    int memory;          // bytes of shared memory of a tile group
    TileScheduler scheduler;

    __host__ __device__ int64_t items() const { return slots * items_per_slot; }
    int64_t blocks() const { return warp_per_tile ? (items() + warps - 1) / warps : items(); }
    __host__ __device__ int threads() const { return warps * kWarp; }
    int shared() const { return warp_per_tile ? warps * memory : memory; }
    int rows() const { return warp_per_tile ? kStationary : warps * kStationary; }  // stationary rows of an item
};

// The first bytes of a tile group's shared memory hold the number of its next item.
constexpr int kNextItemBytes = 16;

// The warps that work on an item, seen from one of their threads.
struct TileGroup {
    const Plan& plan;
    int64_t item;
    ThreadGroup threads;
    int warp, warps;  // number of this warp in the group, and how many there are
    char* memory;     // behind the number of the next item

    __device__ TileGroup(const Plan& plan, int64_t item, int thread) : plan(plan), item(item) {
        const int warp_of_block = thread / kWarp;
        threads = plan.warp_per_tile ? ThreadGroup{thread % kWarp, kWarp} : ThreadGroup{thread, plan.threads()};
        warp = plan.warp_per_tile ? 0 : warp_of_block;
        warps = plan.warp_per_tile ? 1 : plan.warps;
        memory = shared_memory() + (plan.warp_per_tile ? warp_of_block * plan.memory : 0) + kNextItemBytes;
    }
    // At its first item.
    __device__ TileGroup(const Plan& plan, int thread)
        : TileGroup(plan, plan.warp_per_tile ? int64_t{blockIdx.x} * plan.warps + thread / kWarp : int64_t{blockIdx.x},
                    thread) {}

    __device__ int rows() const { return warps * kStationary; }
    __device__ int64_t slot() const { return item / plan.items_per_slot; }
    __device__ int index_in_slot() const { return static_cast<int>(item % plan.items_per_slot); }

    __device__ void sync() const {
        if (threads.size == kWarp)
            __syncwarp();
        else
            __syncthreads();
    }

    // Claims the next item; its number may be beyond all items.
    __device__ int64_t next_item() const {
        int64_t* next = reinterpret_cast<int64_t*>(memory - kNextItemBytes);
        sync();  // all threads are done with the shared memory of the item before
        if (threads.rank == 0)
            *next = int64_t{gridDim.x} * (plan.warp_per_tile ? plan.warps : 1) + plan.scheduler.claim();
        sync();
        return *next;
    }
};

// Whether a launch is persistent, that is, its tile groups do more than one item. Exact float32 products and wide heads
// fill the registers with one: in a loop over items they spill up to 120 bytes. There the device schedules one block
// for each item, in the order of the rows.
template <typename T, int WIDTH>
constexpr bool kPersistent = !std::is_same_v<T, float> && WIDTH <= 64;

// Calls `work(group)` for a tile group's one item, or for one item after another.
template <bool PERSISTENT, typename Work>
__device__ inline void for_each_item(const Plan& plan, Work&& work) {
    const TileGroup first(plan, static_cast<int>(threadIdx.x));
    if constexpr (PERSISTENT) {
#pragma unroll 1
        for (int64_t item = first.item; item < (plan.slots + plan.scheduler.long_slots()) * plan.items_per_slot;) {
            // `thread_index()` is opaque to the compiler: else it keeps values that follow from it in registers.
            work(TileGroup(plan, item, thread_index()));
            item = TileGroup(plan, item, thread_index()).next_item();
        }
    } else if (first.item < plan.items()) {
        work(first);
    }
}

// Starts a kernel of `for_each_item` over tiles of `rows`; its arguments hold the plan.
template <bool PERSISTENT, typename Arguments>
void start_tile_groups(void (*kernel)(Arguments), Arguments& arguments, const TiledRows& rows,
                       const TensorView& scheduler, const Stream& stream) {
    Plan& plan = arguments.plan;
    int64_t blocks = plan.blocks();
    if constexpr (PERSISTENT) {
        const int64_t max_blocks = stream.resident(kernel, plan.threads(), plan.shared());
        // Where every tile group has one item, there is nothing to schedule.
        if (blocks > max_blocks) plan.scheduler = start_scheduler(scheduler, rows, plan.rows(), stream);
        blocks = std::min(blocks, max_blocks);
    }
    stream.launch(kernel, blocks, plan.threads(), plan.shared(), arguments);
}

}  // namespace cuda
}  // namespace interformer
