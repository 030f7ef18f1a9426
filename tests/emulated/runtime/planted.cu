#include "planted.h"

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <stdexcept>

#include "cuda/instructions.cuh"

namespace interformer {
namespace cuda {

namespace {

constexpr int kThreads = 128;

enum Fault {
    kNone,
    kMisalignedCopy,
    kNoWait,
    kNoBarrierAfterCopy,
    kReturnedBeforeBarrier,
    kBeyondSharedMemory,
    kNoBarrierAfterWrite,
    kBeyondTensor,
    kHalfWarp,
    kTooMuchSharedMemory,
    kNextReadTooEarly,
    kMemoryReusedTooEarly,
};
constexpr const char* kNames[] = {"",
                                  "misaligned copy",
                                  "no wait",
                                  "no barrier after the copy",
                                  "returned before a barrier",
                                  "beyond shared memory",
                                  "no barrier after the write",
                                  "beyond the tensor",
                                  "half a warp",
                                  "too much shared memory",
                                  "next item read too early",
                                  "memory reused too early"};

Fault fault_of(const std::string& name) {
    const auto entry = std::find(std::begin(kNames), std::end(kNames), name);
    if (entry == std::end(kNames)) throw std::invalid_argument("no such fault: " + name);
    return static_cast<Fault>(entry - std::begin(kNames));
}

__global__ void __launch_bounds__(kThreads) exchanged(const float* x, float* out, Fault fault) {
    float* copied = reinterpret_cast<float*>(shared_memory());
    float* reversed = copied + kThreads;
    const int i = static_cast<int>(threadIdx.x);
    if (fault == kMisalignedCopy && i == 1)
        cp_async<8>(copied + i, x + i, 4);
    else
        cp_async<4>(copied + i, x + i, 4);
    cp_async_commit();
    if (fault != kNoWait) cp_async_wait<0>();
    if (fault == kReturnedBeforeBarrier && i == 5) return;
    if (fault != kNoBarrierAfterCopy) __syncthreads();
    reversed[i + (fault == kBeyondSharedMemory && i == 127 ? 1 : 0)] = copied[kThreads - 1 - i];
    if (fault != kNoBarrierAfterWrite) __syncthreads();
    const float y = reversed[i == 0 ? 0 : i - 1] + (fault == kBeyondTensor && i == 3 ? x[kThreads] : 0.0f);
    if (fault == kHalfWarp && i % 32 < 16) return;
    out[i] = y + __shfl_xor_sync(0xffffffffu, y, 1);
}

// Reverses rows of kThreads numbers, by persistent blocks that claim one row after another.
__global__ void __launch_bounds__(kThreads)
    reversed_rows(const float* x, float* out, int64_t rows, unsigned long long* claimed, Fault fault) {
    float* copied = reinterpret_cast<float*>(shared_memory());
    int64_t* next = reinterpret_cast<int64_t*>(copied + kThreads);
    const int i = static_cast<int>(threadIdx.x);
    for (int64_t row = blockIdx.x; row >= 0 && row < rows;) {
        copied[i] = x[row * kThreads + i];
        __syncthreads();
        out[row * kThreads + i] = copied[kThreads - 1 - i];
        if (fault == kMemoryReusedTooEarly) {
            row += gridDim.x;
            continue;
        }
        __syncthreads();
        if (i == 0) *next = gridDim.x + static_cast<int64_t>(atomicAdd(claimed, 1ull));
        if (fault != kNextReadTooEarly) __syncthreads();
        row = *next;
    }
}

}  // namespace

void reverse_rows(const std::string& fault, const TensorView& x, const TensorView& claimed, const TensorView& out,
                  const Stream& stream) {
    const int64_t rows = x.shape[0];
    const Checks check = stream.checks();
    check.tensor("x", x, DType::float32, {{"N", rows}, {"128", kThreads}});
    check.tensor("claimed", claimed, DType::int64, {{"1", 1}});
    check.gradient("out", out, "x", x);
    const int shared = kThreads * static_cast<int>(sizeof(float)) + static_cast<int>(sizeof(int64_t));
    const int64_t blocks = std::min(stream.resident(reversed_rows, kThreads, shared), rows);
    stream.launch(reversed_rows, blocks, kThreads, shared, static_cast<const float*>(x.data),
                  static_cast<float*>(out.data), rows, static_cast<unsigned long long*>(claimed.data), fault_of(fault));
}

void exchange(const std::string& fault, const TensorView& x, const TensorView& out, const Stream& stream) {
    const Checks check = stream.checks();
    check.tensor("x", x, DType::float32, {{"N", kThreads}});
    check.gradient("out", out, "x", x);
    const Fault chosen = fault_of(fault);
    const int shared = chosen == kTooMuchSharedMemory ? 1 << 20 : 2 * kThreads * static_cast<int>(sizeof(float));
    stream.launch(exchanged, 1, kThreads, shared, static_cast<const float*>(x.data), static_cast<float*>(out.data),
                  chosen);
}

}  // namespace cuda
}  // namespace interformer
