// Kernels on the caller's stream. Each launch is checked; none waits, allocates, or runs on another device.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/checks.h"
#include "cuda/device.h"

namespace interformer {
namespace cuda {

// Makes a device current, and the caller's device again when it is destroyed.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        if (cudaGetDevice(&before_) == cudaSuccess && before_ != device)
            changed_ = cudaSetDevice(device) == cudaSuccess;
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;

  private:
    int before_ = 0;
    bool changed_ = false;
};

// The stream of one call. The call runs on the device of the tensor `lead`, and errors describe that tensor.
class Stream {
  public:
    Stream(const char* op, const TensorView& lead, void* handle)
        : op_(op), lead_(lead), handle_(static_cast<cudaStream_t>(handle)) {}

    // Checks that every tensor is on the device of the lead, a GPU.
    Checks checks() const {
        if (lead_.device.type != kMemory) Checks(op_).refuse("every tensor", "on a CUDA device", describe(lead_));
        return Checks(op_, lead_.device);
    }

    // Starts `blocks` blocks of `threads` threads with `shared` bytes of shared memory; nothing if `blocks` is 0.
    template <typename... Parameters>
    void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared,
                const Parameters&... parameters) const {
        if (blocks == 0) return;
        if (blocks > kMaxBlocks) fail("a grid of " + std::to_string(blocks) + " blocks is beyond the device");
        const DeviceGuard guard(lead_.device.id);
        allow(kernel, shared);
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(static_cast<unsigned>(blocks));
        config.blockDim = dim3(static_cast<unsigned>(threads));
        config.dynamicSmemBytes = static_cast<size_t>(shared);
        config.stream = handle_;
        check(cudaLaunchKernelEx(&config, kernel, parameters...));
    }

    // The number of such blocks that the device holds at once.
    template <typename... Parameters>
    int64_t resident(void (*kernel)(Parameters...), int threads, int shared) const {
        const DeviceGuard guard(lead_.device.id);
        allow(kernel, shared);
        int processors = 0, blocks = 0;
        check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, lead_.device.id));
        check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, static_cast<size_t>(shared)));
        return std::max<int64_t>(int64_t{processors} * blocks, 1);
    }

  private:
    static constexpr int64_t kMaxBlocks = 2147483647;
    static constexpr int kSharedByDefault = 48 * 1024;

    template <typename... Parameters>
    void allow(void (*kernel)(Parameters...), int shared) const {
        if (shared > kSharedByDefault)
            check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    }
    void check(cudaError_t status) const {
        if (status == cudaSuccess) return;
        cudaGetLastError();  // clears the error, which a later call of the caller would report
        fail(cudaGetErrorString(status));
    }
    [[noreturn]] void fail(const std::string& reason) const {
        throw std::runtime_error(std::string(op_) + " of " + describe(lead_) + ": " + reason);
    }

    const char* op_;
    const TensorView& lead_;
    cudaStream_t handle_;
};

}  // namespace cuda
}  // namespace interformer
