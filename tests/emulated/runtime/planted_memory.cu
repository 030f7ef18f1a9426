#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "cuda/instructions.cuh"
#include "planted.h"

namespace interformer {
namespace cuda {

namespace {

constexpr int kSide = 32;

struct MemoryFaults {
    bool no_padding, transposed_loop;
};

// One warp transposes a matrix of float32 through shared memory: as numbers, and in pieces of 16 bytes.
__global__ void __launch_bounds__(kSide) transposed(const float* x, float* out, MemoryFaults fault) {
    float* tile = reinterpret_cast<float*>(shared_memory());
    const int lane = static_cast<int>(threadIdx.x);
    const int stride = kSide + (fault.no_padding ? 0 : 4);
    for (int i = lane; i < kSide * kSide / 4; i += kSide)
        cp_async<16>(tile + i / 8 * stride + i % 8 * 4, x + i / 8 * kSide + i % 8 * 4, 16);
    cp_async_commit();
    cp_async_wait<0>();
    __syncwarp();
    // Eight rows of 16 bytes to a matrix, which lie in different banks where rows are padded.
    uint32_t matrices[4];
    ldmatrix_x4(matrices, tile + lane * stride);
    const float unused = matrices[0] == 1u ? 1.0f : 0.0f;
    for (int r = 0; r < kSide; ++r) {
        const int row = fault.transposed_loop ? lane : r, column = fault.transposed_loop ? r : lane;
        out[row * kSide + column] = tile[column * stride + row] + 0.0f * unused;
    }
}

}  // namespace

void transpose(const std::string& fault, const TensorView& x, const TensorView& out, const Stream& stream) {
    const Checks check = stream.checks();
    check.tensor("x", x, DType::float32, {{"32", kSide}, {"32", kSide}});
    check.gradient("out", out, "x", x);
    const MemoryFaults faults{fault == "no padding", fault == "transposed loop"};
    if (!fault.empty() && !faults.no_padding && !faults.transposed_loop)
        throw std::invalid_argument("no such fault: " + fault);
    stream.launch(transposed, 1, kSide, kSide * (kSide + 4) * static_cast<int>(sizeof(float)),
                  static_cast<const float*>(x.data), static_cast<float*>(out.data), faults);
}

}  // namespace cuda
}  // namespace interformer
