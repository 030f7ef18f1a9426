// Distribution of tasks over threads.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <memory>

namespace interformer {

// The number of threads worth waking for `work` multiply-adds. Little work runs on the caller's thread alone, without
// touching the OpenMP runtime.
inline int worthwhile_threads(int64_t threads, int64_t tasks, int64_t work) {
    constexpr int64_t kWorkPerThread = 1 << 16;
    return static_cast<int>(std::max<int64_t>(1, std::min({threads, tasks, work / kWorkPerThread})));
}

// Uninitialised memory for each thread. It is allocated before the threads start, since an exception must not leave a
// parallel region.
class ThreadMemory {
  public:
    ThreadMemory(int threads, int64_t bytes)
        : stride_((bytes + kLine - 1) / kLine * kLine), memory_(new char[threads * stride_ + kLine]) {
        const auto address = reinterpret_cast<uintptr_t>(memory_.get());
        first_ = memory_.get() + (kLine - address % kLine) % kLine;
    }

    void* for_thread(int thread) { return first_ + thread * stride_; }

  private:
    static constexpr int64_t kLine = 64;  // threads share no cache line

    int64_t stride_;
    std::unique_ptr<char[]> memory_;
    char* first_;
};

// Calls `body(task, thread)` for every task in [0, tasks). Tasks start in order: when a task starts, all earlier ones
// have started. `body` must not throw. Its result must not depend on the thread; then it does not depend on the number
// of threads either.
template <typename Body>
void parallel_for(int threads, int64_t tasks, Body&& body) {
    if (threads <= 1) {
        for (int64_t task = 0; task < tasks; ++task) body(task, 0);
        return;
    }
#pragma omp parallel for schedule(monotonic : dynamic, 1) num_threads(threads)
    for (int64_t task = 0; task < tasks; ++task) body(task, omp_get_thread_num());
}

}  // namespace interformer
