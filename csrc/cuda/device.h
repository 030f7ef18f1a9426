// What is known of the GPUs of this machine, and where tensors must lie. Compiled where the CUDA part is.
#pragma once

#include "common/tensor_view.h"

namespace interformer {

struct CudaRuntime {
    int device_count;     // 0 also where there is no driver
    int driver_version;   // 13000 for 13.0; 0 where there is no driver
    int runtime_version;  // of the runtime that is linked in
};

CudaRuntime cuda_runtime();

namespace cuda {

// The memory that kernels reach.
constexpr dlpack::DeviceType kMemory = dlpack::kCUDA;

}  // namespace cuda

}  // namespace interformer
