// Launches that are listed instead of run, with their arguments, for tools that judge the kernels' machine code. Grids
// of one block run all the same: they make lists that other kernels read.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "scheduler.h"

namespace emulation {

struct Launched {
    Grid grid;
    std::string arguments;  // as they lie in the device's memory of arguments
};

extern bool listing_launches;
void list_launches(bool on);  // forgets those of before
std::vector<Launched>& launches();

template <typename... Arguments>
std::string packed(const Arguments&... arguments) {
    std::string bytes;
    const auto add = [&](const void* from, size_t size, size_t alignment) {
        bytes.resize((bytes.size() + alignment - 1) / alignment * alignment);
        bytes.append(static_cast<const char*>(from), size);
    };
    (add(&arguments, sizeof arguments, alignof(Arguments)), ...);
    return bytes;
}

}  // namespace emulation
