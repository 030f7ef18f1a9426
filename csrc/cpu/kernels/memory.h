// Addresses in tensors, and the layout of a thread's memory.
#pragma once

#include "cpu/kernels/elements.h"
#include "cpu/row_tensor.h"

INTERFORMER_ISA_BEGIN

template <typename T, typename X = T>
INTERFORMER_INLINE X* address(const RowTensor& x, int64_t row, int64_t token, int64_t head) {
    const int64_t first = x.begins ? x.begins[row] * x.token : row * x.row;
    return static_cast<X*>(x.data) + first + token * x.token + head * x.head;
}

// Allocates buffers in a thread's memory, each on cache lines of its own. Without memory it only counts the bytes.
class Arena {
  public:
    explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}

    template <typename E>
    E* allocate(int64_t count) {
        E* buffer = memory_ == nullptr ? nullptr : reinterpret_cast<E*>(memory_ + used_);
        used_ += round_up(count * static_cast<int64_t>(sizeof(E)), 64);
        return buffer;
    }
    int64_t bytes() const { return used_; }

  private:
    char* memory_;
    int64_t used_ = 0;
};

INTERFORMER_ISA_END
