// Sharing tasks out to threads.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <memory>

namespace interformer {

// How many of `threads` are worth waking for `work` multiply-adds. Work below one thread's share runs on the caller's
// thread alone, without touching the OpenMP runtime.
inline int worthwhile_threads(int64_t threads, int64_t tasks, int64_t work) {
    constexpr int64_t kShare = 1 << 16;
    return static_cast<int>(std::max<int64_t>(1, std::min({threads, tasks, work / kShare})));
}

// Memory for each thread, taken before the threads start: a failed allocation must not leave a parallel region. Numbers
// in it are not initialised.
template <typename A>
class Scratch {
  public:
    Scratch(int threads, int64_t size)
        : stride_((size + kLine - 1) / kLine * kLine + kLine), memory_(new A[threads * stride_]) {}

    A* of(int thread) { return memory_.get() + thread * stride_; }

  private:
    static constexpr int64_t kLine = 64 / sizeof(A);  // whole cache lines, so that threads share none

    int64_t stride_;
    std::unique_ptr<A[]> memory_;
};

// Calls `body(task, thread)` for every task in [0, tasks). `body` may not throw, and its result may not depend on
// the thread: then the result does not depend on the number of threads either.
template <typename Body>
void parallel_for(int threads, int64_t tasks, Body&& body) {
    if (threads <= 1) {
        for (int64_t task = 0; task < tasks; ++task) body(task, 0);
        return;
    }
    const int64_t chunk = std::max<int64_t>(1, tasks / (threads * int64_t{32}));  // small, since rows differ in length
#pragma omp parallel for schedule(dynamic, chunk) num_threads(threads)
    for (int64_t task = 0; task < tasks; ++task) body(task, omp_get_thread_num());
}

}  // namespace interformer
