#include "launches.h"

namespace emulation {

bool listing_launches = false;

std::vector<Launched>& launches() {
    static std::vector<Launched> all;
    return all;
}

void list_launches(bool on) {
    listing_launches = on;
    launches().clear();
}

}  // namespace emulation
