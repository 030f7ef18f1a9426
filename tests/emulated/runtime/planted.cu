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
    kHalfAWarp,
    kTooMuchSharedMemory,
    kNextBeforeItIsTold,
    kMemoryTakenTooEarly,
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
                                  "next before it is told",
                                  "memory taken too early"};

Fault fault_of(const std::string& name) {
    const auto found = std::find(std::begin(kNames), std::end(kNames), name);
    if (found == std::end(kNames)) throw std::invalid_argument("no such fault: " + name);
    return static_cast<Fault>(found - std::begin(kNames));
}

__global__ void __launch_bounds__(kThreads) exchanged(const float* x, float* out, Fault fault) {
    float* copied = reinterpret_cast<float*>(shared_memory());
    float* turned = copied + kThreads;
    const int i = static_cast<int>(threadIdx.x);
    if (fault == kMisalignedCopy && i == 1)
        start_copy<8>(copied + i, x + i, 4);
    else
        start_copy<4>(copied + i, x + i, 4);
    close_copies();
    if (fault != kNoWait) wait_copies<0>();
    if (fault == kReturnedBeforeBarrier && i == 5) return;
    if (fault != kNoBarrierAfterCopy) __syncthreads();
    turned[i + (fault == kBeyondSharedMemory && i == 127 ? 1 : 0)] = copied[kThreads - 1 - i];
    if (fault != kNoBarrierAfterWrite) __syncthreads();
    const float y = turned[i == 0 ? 0 : i - 1] + (fault == kBeyondTensor && i == 3 ? x[kThreads] : 0.0f);
    if (fault == kHalfAWarp && i % 32 < 16) return;
    out[i] = y + __shfl_xor_sync(0xffffffffu, y, 1);
}

// Pieces of kThreads numbers, each turned round, by blocks that stay and take one after another.
__global__ void __launch_bounds__(kThreads)
    turned_pieces(const float* x, float* out, int64_t pieces, unsigned long long* taken, Fault fault) {
    float* copied = reinterpret_cast<float*>(shared_memory());
    int64_t* told = reinterpret_cast<int64_t*>(copied + kThreads);
    const int i = static_cast<int>(threadIdx.x);
    for (int64_t piece = blockIdx.x; piece >= 0 && piece < pieces;) {
        copied[i] = x[piece * kThreads + i];
        __syncthreads();
        out[piece * kThreads + i] = copied[kThreads - 1 - i];
        if (fault == kMemoryTakenTooEarly) {
            piece += gridDim.x;
            continue;
        }
        __syncthreads();
        if (i == 0) *told = gridDim.x + static_cast<int64_t>(atomicAdd(taken, 1ull));
        if (fault != kNextBeforeItIsTold) __syncthreads();
        piece = *told;
    }
}

}  // namespace

void turn_pieces(const std::string& fault, const TensorView& x, const TensorView& taken, const TensorView& out,
                 const Stream& stream) {
    const int64_t pieces = x.shape[0];
    const Checks check = stream.checks();
    check.tensor("x", x, DType::float32, {{"P", pieces}, {"N", kThreads}});
    check.tensor("taken", taken, DType::int64, {{"1", 1}});
    check.gradient("out", out, "x", x);
    const int shared = kThreads * static_cast<int>(sizeof(float)) + static_cast<int>(sizeof(int64_t));
    const int64_t blocks = std::min(stream.resident(turned_pieces, kThreads, shared), pieces);
    stream.launch(turned_pieces, blocks, kThreads, shared, static_cast<const float*>(x.data),
                  static_cast<float*>(out.data), pieces, static_cast<unsigned long long*>(taken.data), fault_of(fault));
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
