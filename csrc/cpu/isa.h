// The instruction set that the kernels run with: the best compiled one that this machine supports. Users know it as
// the CPU level.
#pragma once

#include <string>
#include <vector>

#include "common/tensor_view.h"
#include "cpu/kernel_table.h"

namespace interformer {

// Names of the compiled instruction sets that this machine can run, the best one last.
std::vector<std::string> usable_isas();

// The best one, or the one that INTERFORMER_CPU_LEVEL names (read once). Throws std::invalid_argument where that one
// cannot run.
const std::string& chosen_isa();

// The kernels of the chosen instruction set for a floating dtype.
const Kernels& kernels(DType dtype);

}  // namespace interformer
