// The warps of a launch that work together, how many they are, and what they do one after another.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/instructions.cuh"
#include "cuda/queue.cuh"
#include "cuda/tiles.cuh"

namespace interformer {
namespace cuda {

constexpr int kOwn = 16;       // rows of a warp
constexpr int kMostWarps = 4;  // of a block

// How a launch shares its items out, an item being what a crew does at once: a part of a slot.
struct Plan {
    int64_t slots;
    int parts;   // of a slot
    int warps;   // of a block
    bool alone;  // each warp is a crew; else a block is
    int stages;  // tiles of others in shared memory
    int memory;  // bytes of shared memory of a crew
    Queue queue;

    __host__ __device__ int64_t items() const { return slots * parts; }
    int64_t blocks() const { return alone ? (items() + warps - 1) / warps : items(); }
    __host__ __device__ int threads() const { return warps * kWarp; }
    int shared() const { return alone ? warps * memory : memory; }
    int rows() const { return alone ? kOwn : warps * kOwn; }  // own rows of an item
};

// Bytes of a crew's shared memory, the first ones, that it tells its warps the next item by.
constexpr int kToldNext = 16;

// The warps that work on an item, one of whose threads this is.
struct Crew {
    const Plan& plan;
    int64_t item;
    Team team;
    int warp, warps;  // this one, and how many
    char* memory;     // behind the first bytes

    __device__ Crew(const Plan& of, int64_t number, int thread) : plan(of), item(number) {
        const int of_block = thread / kWarp;
        team = plan.alone ? Team{thread % kWarp, kWarp} : Team{thread, plan.threads()};
        warp = plan.alone ? 0 : of_block;
        warps = plan.alone ? 1 : plan.warps;
        memory = shared_memory() + (plan.alone ? of_block * plan.memory : 0) + kToldNext;
    }
    // At its first item.
    __device__ Crew(const Plan& of, int thread)
        : Crew(of, of.alone ? int64_t{blockIdx.x} * of.warps + thread / kWarp : int64_t{blockIdx.x}, thread) {}

    __device__ int rows() const { return warps * kOwn; }
    __device__ int64_t slot() const { return item / plan.parts; }
    __device__ int part() const { return static_cast<int>(item % plan.parts); }

    // A barrier.
    __device__ void meet() const {
        if (team.size == kWarp)
            __syncwarp();
        else
            __syncthreads();
    }

    // The number of the next item, which may be beyond all.
    __device__ int64_t next() const {
        int64_t* told = reinterpret_cast<int64_t*>(memory - kToldNext);
        meet();  // nobody reads any more what the item before left in shared memory
        if (team.index == 0) *told = int64_t{gridDim.x} * (plan.alone ? plan.warps : 1) + plan.queue.take();
        meet();
        return *told;
    }
};

// Whether crews stay for more than one item. Exact products and wide heads fill the registers with one: in a loop over
// items they spill up to 120 bytes. Their blocks are handed out by the device, a block for each item, as rows come.
template <typename T, int WIDTH>
constexpr bool kStays = !std::is_same_v<T, float> && WIDTH <= 64;

// Calls `work(crew)` for a crew's item, or for item after item.
template <bool STAYS, typename Work>
__device__ inline void each_item(const Plan& plan, Work&& work) {
    const Crew first(plan, static_cast<int>(threadIdx.x));
    if constexpr (STAYS) {
#pragma unroll 1
        for (int64_t item = first.item; item < (plan.slots + plan.queue.first_slots()) * plan.parts;) {
            // Made of an index that the compiler does not know: it would keep in registers what follows from it.
            work(Crew(plan, item, thread_index()));
            item = Crew(plan, item, thread_index()).next();
        }
    } else if (first.item < plan.items()) {
        work(first);
    }
}

// Starts a kernel of `each_item`. Its slots are tiles of `rows`, a token being `units` of what is cut there;
// `long_first` where a tile of a longer row is more work.
template <bool STAYS, typename Arguments>
void start_crews(void (*kernel)(Arguments), Arguments& of, const Offsets& rows, int64_t units, bool long_first,
                 const TensorView& queue, const Stream& stream) {
    Plan& plan = of.plan;
    int64_t blocks = plan.blocks();
    if constexpr (STAYS) {
        const int64_t most = stream.resident(kernel, plan.threads(), plan.shared());
        // Where every crew has one item, none waits for another.
        if (blocks > most) plan.queue = start_queue(queue, rows, long_first, units, plan.rows(), stream);
        blocks = std::min(blocks, most);
    }
    stream.launch(kernel, blocks, plan.threads(), plan.shared(), of);
}

}  // namespace cuda
}  // namespace interformer
