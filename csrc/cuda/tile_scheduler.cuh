// Dynamic tile scheduling: one long row among many short ones delays no other work.
//
// A persistent launch has no more blocks than the device holds at once. A tile group starts with the work item of its
// own number and then claims one item after another from a counter in memory. A group that is busy with a long item
// claims fewer; a static stride would queue later items behind it. The counter is the only atomic and holds integers,
// and an item's work does not depend on the group that claims it, so no bit depends on the order.
//
// Where longer rows make longer items, tiles of long rows come first, so that the last items to start are short. A row
// is long if it has more than `step` tokens: every such row contains one of the probes, which are `step` tokens apart.
// A kernel of one block finds long rows by the probes and counts their tiles before the kernel that works. The slots
// of all rows come after these, and those of long rows are idle there.
#pragma once

#include <cstdint>

#include "cuda/attention.h"
#include "cuda/rows.cuh"
#include "cuda/stream.h"

namespace interformer {
namespace cuda {

constexpr int kProbes = 256;
static_assert(kSchedulerSize == kProbes + 2, "a counter, and the tiles before each probe and of all");

// Rows that a launch cuts into tiles: `per_token` packed rows to a token.
struct TiledRows {
    const Offsets& offsets;
    int64_t per_token;
    bool long_first;  // a tile of a longer row is more work
};

struct TileScheduler {
    unsigned long long* claimed = nullptr;  // items claimed so far; null: a group does its first item and no other
    int64_t* long_tiles = nullptr;  // tiles of long rows before each probe, and of all; null: no row comes first
    int64_t step = 0;

    // The number of a claimed item, counted from 0; beyond all items where there is no counter.
    __device__ int64_t claim() const {
        return claimed == nullptr ? INT64_MAX / 2 : static_cast<int64_t>(atomicAdd(claimed, 1ull));
    }

    // Slots of long rows, which come before those of all rows.
    __device__ int64_t long_slots() const { return long_tiles == nullptr ? 0 : long_tiles[kProbes]; }

    // Row and tile of a slot, where tiles are `block` packed rows, `per_token` of them to a token.
    __device__ Slot find(const Offsets& offsets, int64_t slot, int64_t per_token, int64_t block) const {
        const int64_t before = long_slots();
        if (slot >= before) {
            Slot result = offsets.find(slot - before, per_token, block);
            if (before > 0 && is_long(offsets, result.span)) result.begin = result.span.count * per_token;
            return result;
        }
        // The last probe before which there are at most `slot` tiles.
        int64_t low = 0, high = kProbes - 1;
        while (low < high) {
            const int64_t middle = (low + high + 1) / 2;
            if (long_tiles[middle] <= slot)
                low = middle;
            else
                high = middle - 1;
        }
        return {offsets.row_at(low * step), (slot - long_tiles[low]) * block};
    }

    // The tail is never long: there is no work on it.
    __device__ bool is_long(const Offsets& offsets, const Span& row) const {
        return row.row < offsets.rows && row.count > step;
    }
};

// Resets the counter in `memory`, and lists long rows in tiles of `block` packed rows where these come first.
TileScheduler start_scheduler(const TensorView& memory, const TiledRows& rows, int64_t block, const Stream& stream);

}  // namespace cuda
}  // namespace interformer
