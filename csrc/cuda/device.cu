#include <cuda_runtime.h>

#include "cuda/device.h"

namespace interformer {

CudaRuntime cuda_runtime() {
    CudaRuntime runtime{0, 0, 0};
    // Each failure means "none here": a machine without a GPU or a driver is an ordinary one.
    if (cudaGetDeviceCount(&runtime.device_count) != cudaSuccess) runtime.device_count = 0;
    if (cudaDriverGetVersion(&runtime.driver_version) != cudaSuccess) runtime.driver_version = 0;
    if (cudaRuntimeGetVersion(&runtime.runtime_version) != cudaSuccess) runtime.runtime_version = 0;
    cudaGetLastError();  // clears the error, which a later call of the caller would report
    return runtime;
}

}  // namespace interformer
