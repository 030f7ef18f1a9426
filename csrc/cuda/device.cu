#include <cuda_runtime.h>

#include "cuda/device.h"

namespace interformer {

CudaRuntime cuda_runtime() {
    CudaRuntime found{0, 0, 0};
    // Each failure means "none here": a machine without a GPU or a driver is an ordinary one.
    if (cudaGetDeviceCount(&found.device_count) != cudaSuccess) found.device_count = 0;
    if (cudaDriverGetVersion(&found.driver_version) != cudaSuccess) found.driver_version = 0;
    if (cudaRuntimeGetVersion(&found.runtime_version) != cudaSuccess) found.runtime_version = 0;
    cudaGetLastError();  // so that the next call of somebody else does not find ours
    return found;
}

}  // namespace interformer
