// What is known of the GPUs of this machine. Compiled where the CUDA part is.
#pragma once

namespace interformer {

struct CudaRuntime {
    int device_count;     // 0 also where there is no driver
    int driver_version;   // 13000 for 13.0; 0 where there is no driver
    int runtime_version;  // of the runtime that is linked in
};

CudaRuntime cuda_runtime();

}  // namespace interformer
