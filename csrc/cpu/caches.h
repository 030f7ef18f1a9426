// The size of the caches: streaming stores and prefetches pay where a tensor exceeds them, and cost where it fits.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstdint>

namespace interformer {

// Whether so many bytes are more than the last level of cache keeps for a call. Systems report the whole socket's, of
// which a process on a few of its cores cannot count on more than `kMost`.
inline bool exceed_caches(int64_t bytes) {
    static constexpr int64_t kLeast = int64_t{8} << 20, kMost = int64_t{32} << 20;
    static const int64_t last_level = [] {
#ifdef _SC_LEVEL3_CACHE_SIZE
        return std::clamp<int64_t>(sysconf(_SC_LEVEL3_CACHE_SIZE), kLeast, kMost);
#else
        return kMost;
#endif
    }();
    return bytes > last_level;
}

}  // namespace interformer
