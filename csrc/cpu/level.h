// The instruction set that the kernels run with: the best of those compiled that this machine has.
#pragma once

#include <string>
#include <vector>

#include "common/tensor_view.h"
#include "cpu/kernels.h"

namespace interformer {

// Names of the compiled instruction sets that this machine can run, the best one last.
std::vector<std::string> usable_levels();

// The best one, or the one that INTERFORMER_CPU_LEVEL names (read once); throws std::invalid_argument where it is not
// among them.
const std::string& chosen_level();

// Kernels of the chosen level for this dtype, a floating one.
const Kernels& kernels(DType dtype);

}  // namespace interformer
