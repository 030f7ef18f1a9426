// How kernels reach tensors and a thread's memory.
#pragma once

#include "cpu/kernels/elements.h"
#include "cpu/row_tensor.h"

INTERFORMER_LEVEL_BEGIN

template <typename T, typename X = T>
INTERFORMER_INLINE X* address(const RowTensor& x, int64_t row, int64_t token, int64_t head) {
    const int64_t first = x.begins ? x.begins[row] * x.token : row * x.row;
    return static_cast<X*>(x.data) + first + token * x.token + head * x.head;
}

// Hands out pieces of a thread's memory, each on a cache line of its own; with none, it only counts.
class Memory {
  public:
    explicit Memory(void* memory) : at_(static_cast<char*>(memory)) {}

    template <typename E>
    E* take(int64_t count) {
        E* piece = at_ == nullptr ? nullptr : reinterpret_cast<E*>(at_ + used_);
        used_ += round_up(count * static_cast<int64_t>(sizeof(E)), 64);
        return piece;
    }
    int64_t bytes() const { return used_; }

  private:
    char* at_;
    int64_t used_ = 0;
};

INTERFORMER_LEVEL_END
