// Kernels with faults to choose from, which the emulation must find: the test of the tests.
#pragma once

#include <string>

#include "cuda/stream.h"

namespace interformer {
namespace cuda {

// Of `x`, 128 float32 numbers, with r = x in reverse and y = (r_0, r_0, r_1, ..., r_126): out_i = y_i + y_(i xor 1).
// `fault` is empty, or what is wrong with the kernel.
void exchange(const std::string& fault, const TensorView& x, const TensorView& out, const Stream& stream);

// Each row of `x`, [P, 128] float32, turned round, by blocks that count in `taken`, one int64 number that is 0.
void turn_pieces(const std::string& fault, const TensorView& x, const TensorView& taken, const TensorView& out,
                 const Stream& stream);

}  // namespace cuda
}  // namespace interformer
