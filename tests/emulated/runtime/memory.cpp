#include "memory.h"

#include <algorithm>
#include <set>

extern "C" {
extern const char __ehdr_start[] __attribute__((visibility("hidden")));
extern const char _end[] __attribute__((visibility("hidden")));
}

namespace emulation {

bool counting_memory = false;

namespace {

constexpr uintptr_t kSector = 32, kBank = 4, kBanks = 32;
std::map<Place, Traffic> traffic;

using Lanes = std::vector<LaneAccess>;

// Different units of `size` bytes that the lanes [first, last) of a request touch.
std::set<uintptr_t> touched(const Lanes& lanes, uintptr_t size, int first = 0, int last = 32) {
    std::set<uintptr_t> units;
    for (const LaneAccess& access : lanes)
        if (first <= access.lane && access.lane < last)
            for (uintptr_t unit = access.address / size; unit * size < access.address + access.bytes; ++unit)
                units.insert(unit);
    return units;
}

int64_t divided_up(size_t x, size_t by) {
    return static_cast<int64_t>((x + by - 1) / by);
}

Traffic global_traffic(const Lanes& lanes) {
    const size_t bytes = touched(lanes, 1).size();
    return {1, static_cast<int64_t>(touched(lanes, kSector).size()), divided_up(bytes, kSector),
            static_cast<int64_t>(bytes)};
}

// Lanes with 8 or 16 bytes are served in two or four groups.
Traffic shared_traffic(const Lanes& lanes) {
    Traffic all{1, 0, 0, static_cast<int64_t>(touched(lanes, 1).size())};
    const int group = 32 / std::max(1, lanes.front().bytes / 4);
    for (int first = 0; first < 32; first += group) {
        const std::set<uintptr_t> words = touched(lanes, kBank, first, first + group);
        int64_t in_bank[kBanks] = {};
        for (const uintptr_t word : words) ++in_bank[word % kBanks];
        all.units += *std::max_element(std::begin(in_bank), std::end(in_bank));
        all.fewest += divided_up(words.size(), kBanks);
    }
    return all;
}

}  // namespace

void WarpAccesses::add(Access access, const void* code, const LaneAccess& lane) {
    Requests& here = places_[{code, access}];
    const size_t number = here.seen[lane.lane]++;
    if (number >= here.requests.size()) here.requests.resize(number + 1);
    here.requests[number].push_back(lane);
}

void WarpAccesses::close(const void* kernel) {
    for (const auto& [place, made] : places_) {
        Traffic& sum = traffic[{kernel, place.second, place.first}];
        const bool global = place.second <= Access::copy;
        for (const Lanes& lanes : made.requests) {
            const Traffic one = global ? global_traffic(lanes) : shared_traffic(lanes);
            sum.requests += one.requests;
            sum.units += one.units;
            sum.fewest += one.fewest;
            sum.bytes += one.bytes;
        }
    }
    places_.clear();
}

void count_memory(bool on) {
    counting_memory = on;
    traffic.clear();
}

const std::map<Place, Traffic>& memory_traffic() {
    return traffic;
}

bool in_module(const void* address) {
    return address >= __ehdr_start && address < _end;
}

uintptr_t module_offset(const void* address) {
    return reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(__ehdr_start);
}

}  // namespace emulation

// ---------------------------------------------------------------- called by instrumented code

// Under another sanitizer nothing is instrumented for these, and the compiler declares them with other parameters.
#ifndef __SANITIZE_ADDRESS__

#define INSTRUMENTED(name, writes, bytes)                                                 \
    extern "C" void name(const void* address) {                                           \
        if (__builtin_expect(emulation::counting_memory, false))                          \
            emulation::plain_access(writes, address, bytes, __builtin_return_address(0)); \
    }
#define INSTRUMENTED_SIZE(bytes)                             \
    INSTRUMENTED(__tsan_read##bytes, false, bytes)           \
    INSTRUMENTED(__tsan_write##bytes, true, bytes)           \
    INSTRUMENTED(__tsan_unaligned_read##bytes, false, bytes) \
    INSTRUMENTED(__tsan_unaligned_write##bytes, true, bytes)
INSTRUMENTED_SIZE(1)
INSTRUMENTED_SIZE(2)
INSTRUMENTED_SIZE(4)
INSTRUMENTED_SIZE(8)
INSTRUMENTED_SIZE(16)

#define INSTRUMENTED_RANGE(name, writes)                                                                    \
    extern "C" void name(const void* address, size_t bytes) {                                               \
        if (__builtin_expect(emulation::counting_memory, false))                                            \
            emulation::plain_access(writes, address, static_cast<int>(bytes), __builtin_return_address(0)); \
    }
INSTRUMENTED_RANGE(__tsan_read_range, false)
INSTRUMENTED_RANGE(__tsan_write_range, true)
extern "C" void __tsan_init() {}
extern "C" void __tsan_vptr_update(void**, void*) {}

#endif
