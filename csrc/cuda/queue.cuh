// Work that is taken piece by piece until none is left: one long row among many short ones holds up nobody else.
//
// A launch has no more blocks than the device holds at once. What works together there, a crew, does the item of its
// own number first, and then whatever item a counter in memory hands out next. Who is at something long takes little:
// a stride, which fixes beforehand who does what, would leave all that follows a long item to wait for it. Only
// integers are counted, and every item does the same whoever takes it: no bit depends on the order.
//
// Where items are slots of rows and long rows make long items, those go first; the last items to start are short then.
// Long is more than `step` tokens: every such row holds one of the marks that stand `step` tokens apart. From these a
// kernel of one block lists tiles of long rows, before the one that works; the slots of all rows follow, in which long
// ones are idle.
#pragma once

#include <cstdint>

#include "cuda/rows.cuh"
#include "cuda/stream.h"

namespace interformer {
namespace cuda {

constexpr int kMarks = 256;
constexpr int64_t kQueueSize = kMarks + 2;  // int64 numbers of memory, of any content, that a queue needs

struct Queue {
    unsigned long long* taken = nullptr;  // items handed out; none: each crew does its own item and no other
    int64_t* listed = nullptr;            // tiles of long rows before each mark, and of all; none: no row goes first
    int64_t step = 0;

    // The number of an item, counted from 0; beyond all where nothing is handed out.
    __device__ int64_t take() const {
        return taken == nullptr ? INT64_MAX / 2 : static_cast<int64_t>(atomicAdd(taken, 1ull));
    }

    // Slots that come before those of all rows.
    __device__ int64_t first_slots() const { return listed == nullptr ? 0 : listed[kMarks]; }

    // Of a slot of tiles of `block` units, each token being `units` of them.
    __device__ Slot find(const Offsets& offsets, int64_t slot, int64_t units, int64_t block) const {
        const int64_t early = first_slots();
        if (slot >= early) {
            Slot found = offsets.find(slot - early, units, block);
            if (early > 0 && is_long(offsets, found.span)) found.begin = found.span.count * units;
            return found;
        }
        // The last mark before which there are no more tiles than this slot's number.
        int64_t low = 0, high = kMarks - 1;
        while (low < high) {
            const int64_t middle = (low + high + 1) / 2;
            if (listed[middle] <= slot)
                low = middle;
            else
                high = middle - 1;
        }
        return {offsets.holder(low * step), (slot - listed[low]) * block};
    }

    // The tail is not, since there is nothing to do on it.
    __device__ bool is_long(const Offsets& offsets, const Span& row) const {
        return row.row < offsets.rows && row.count > step;
    }
};

// Starts to count anew, in `memory`. Where long rows go first, they are cut into tiles as for `Queue::find`.
Queue start_queue(const TensorView& memory, const Offsets& rows, bool long_first, int64_t units, int64_t block,
                  const Stream& stream);

}  // namespace cuda
}  // namespace interformer
