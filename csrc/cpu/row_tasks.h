// The work of a call whose rows have nothing to do with one another, divided over threads.
#pragma once

#include "common/tensor_view.h"
#include "cpu/parallel.h"
#include "cpu/row_tensor.h"
#include "cpu/rows.h"

namespace interformer {

// A packed tensor [T, H] with a number for each token under each head.
inline RowTensor token_scores(const TensorView& x, const int64_t* begins) {
    return {x.data, begins, 0, x.strides[0], x.strides[1], 1, true};
}

// Calls `task(first, last, memory)` for groups of the rows [first, last). A token takes `work` multiply-adds, and a
// thread needs so many `bytes`.
template <typename Task>
void for_row_groups(const Rows& rows, int64_t threads, int64_t work, int64_t bytes, Task&& task) {
    // A row without tokens takes a little time, too.
    const RowGroups groups(rows.count(), kMaxRowGroups,
                           [&](int64_t row) { return static_cast<double>(1 + rows.counts()[row]); });
    const int64_t useful = rows.ordered() ? threads : 1;  // rows that overlap write the same tokens
    const int active =
        worthwhile_threads(useful, groups.count(), static_cast<int64_t>(groups.total() * static_cast<double>(work)));
    ThreadMemory memory(active, bytes);
    parallel_for(active, groups.count(), [&](int64_t i, int thread) {
        const int64_t group = groups.scheduled(i);
        task(groups.bound(group), groups.bound(group + 1), memory.for_thread(thread));
    });
}

}  // namespace interformer
