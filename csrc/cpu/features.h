// The instruction sets of this processor, by the names that compilers use.
#pragma once

#include <string>
#include <vector>

namespace interformer {

std::vector<std::string> cpu_features();

}  // namespace interformer
