// Kernels with planted faults, which the emulation must find: a test of the tests.
#pragma once

#include <string>

#include "cuda/stream.h"

namespace interformer {
namespace cuda {

// For `x`, 128 float32 numbers, with r = x in reverse and y = (r_0, r_0, r_1, ..., r_126): out_i = y_i + y_(i xor 1).
// `fault` names the kernel's fault; empty: none.
void exchange(const std::string& fault, const TensorView& x, const TensorView& out, const Stream& stream);

// Reverses each row of `x`, [N, 128] float32, by persistent blocks that count in `claimed`, one int64 number that is 0.
void reverse_rows(const std::string& fault, const TensorView& x, const TensorView& claimed, const TensorView& out,
                  const Stream& stream);

// Transposes `x`, [32, 32] float32. Its faults cost time alone: a tile without padding, and a loop over rows for
// columns.
void transpose(const std::string& fault, const TensorView& x, const TensorView& out, const Stream& stream);

}  // namespace cuda
}  // namespace interformer
