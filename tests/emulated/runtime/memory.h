// Counts the memory requests of warps as a GPU would serve them: sectors of 32 bytes in global memory, and wavefronts
// of shared memory, which take one each unless lanes meet in a bank. The kernels are compiled with GCC's
// instrumentation for race detectors, whose functions `memory.cpp` defines, so that plain loads and stores are seen
// without a change of the kernels.
//
// The n-th access of each lane from one place of the code, since the warp's lanes last waited for one another, are one
// request: where lanes take turns at a place, the count is that of a warp whose lanes all run there together.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

namespace emulation {

enum class Access { global_load, global_store, copy, shared_load, shared_store, copy_store, matrix_load };
constexpr const char* kAccessNames[] = {"global load",  "global store", "copy",       "shared load",
                                        "shared store", "copy store",   "matrix load"};

struct LaneAccess {
    int lane;
    uintptr_t address;
    int bytes;
};

// Requests from one place of a kernel. `units` are sectors or wavefronts, and `fewest` those of lanes whose bytes lie
// side by side, or in different banks; `bytes` are different bytes of each request.
struct Traffic {
    int64_t requests = 0, units = 0, fewest = 0, bytes = 0;
};
struct Place {
    const void* kernel;
    Access access;
    const void* code;
    bool operator<(const Place& other) const {
        if (kernel != other.kernel) return kernel < other.kernel;
        return access != other.access ? access < other.access : code < other.code;
    }
};

// Accesses of one warp since its lanes last waited for one another.
class WarpAccesses {
  public:
    void add(Access access, const void* code, const LaneAccess& lane);
    // Adds the requests to those of `kernel`, and forgets them.
    void close(const void* kernel);

  private:
    struct Requests {
        uint32_t seen[32] = {};  // accesses of each lane
        std::vector<std::vector<LaneAccess>> requests;
    };
    std::map<std::pair<const void*, Access>, Requests> places_;
};

extern bool counting_memory;
void count_memory(bool on);  // forgets what was counted
const std::map<Place, Traffic>& memory_traffic();

// Whether an address is one of this module's own variables or constants.
bool in_module(const void* address);
// The offset in this module by which tools name a place of its code.
uintptr_t module_offset(const void* address);

// An access of the running thread; defined by the scheduler, which knows its stacks and shared memory.
void plain_access(bool writes, const void* address, int bytes, const void* code);

}  // namespace emulation
