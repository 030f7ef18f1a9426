// Huge pages for large outputs that are about to be written for the first time.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>

#include "common/tensor_view.h"

namespace interformer {

// The system maps fresh memory page by page at the first write, which costs more than the writing: 64 MiB took 43 ms to
// fill, and 10 ms on huge pages (Zen 3). glibc maps every allocation of 32 MiB or more afresh, smaller ones sometimes.
// The call costs 1 us. `output` is contiguous. A system may refuse the advice and serve small pages.
inline void advise_huge_pages(const TensorView& output) {
#ifdef MADV_HUGEPAGE
    constexpr uint64_t kLarge = uint64_t{8} << 20, kPage = 4096;
    const uint64_t bytes = static_cast<uint64_t>(output.size()) * output.raw_type.bits / 8;
    if (bytes < kLarge) return;
    const auto begin = reinterpret_cast<uintptr_t>(output.data);
    const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = (begin + bytes) / kPage * kPage;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)output;
#endif
}

}  // namespace interformer
