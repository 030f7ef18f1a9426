// Memory of large outputs that are about to be written for the first time.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>

#include "common/tensor_view.h"

namespace interformer {

// The system gives fresh memory page by page as it is written, which costs more than the writing: 64 MiB took 43 ms to
// fill, and 10 on huge pages (Zen 3). From 32 MiB on, glibc takes every allocation afresh, below that sometimes; a
// call costs 1 us. `output` is contiguous; a system that refuses serves small pages, as it would anyhow.
inline void want_huge_pages(const TensorView& output) {
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
