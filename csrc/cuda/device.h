// GPUs of this machine, and the memory that tensors must be in. Compiled only with the CUDA part.
#pragma once

#include "common/tensor_view.h"

namespace interformer {

struct CudaRuntime {
    int device_count;     // 0 without a driver, too
    int driver_version;   // 13000 for 13.0; 0 without a driver
    int runtime_version;  // version of the linked runtime
};

CudaRuntime cuda_runtime();

namespace cuda {

// The memory that kernels access.
constexpr dlpack::DeviceType kMemory = dlpack::kCUDA;

}  // namespace cuda

}  // namespace interformer
