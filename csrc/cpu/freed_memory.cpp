#include "cpu/freed_memory.h"

#include <cstdlib>  // defines __GLIBC__

#if defined(__linux__) && defined(__GLIBC__)
#include <dlfcn.h>
#include <malloc.h>
#endif

namespace interformer {

bool keep_freed_memory() {
#if defined(__linux__) && defined(__GLIBC__)
    // Another allocator may stand before the system's, which then serves nobody.
    Dl_info of_malloc, of_mallopt;
    if (dladdr(reinterpret_cast<void*>(&std::malloc), &of_malloc) == 0) return false;
    if (dladdr(reinterpret_cast<void*>(&mallopt), &of_mallopt) == 0) return false;
    if (of_malloc.dli_fbase != of_mallopt.dli_fbase) return false;
    // No block has a mapping of its own, which would go with it, and the end of the heap is not cut off.
    return mallopt(M_MMAP_MAX, 0) == 1 && mallopt(M_TRIM_THRESHOLD, -1) == 1;
#else
    return false;
#endif
}

}  // namespace interformer
