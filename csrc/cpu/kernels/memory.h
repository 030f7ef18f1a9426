// How kernels reach tensors and a thread's memory.
#pragma once

#include "cpu/kernels/elements.h"
#include "cpu/row_tensor.h"

INTERFORMER_LEVEL_BEGIN

template <typename T, typename X = T>
inline X* address(const RowTensor& x, int64_t row, int64_t token, int64_t head) {
    const int64_t first = x.begins ? x.begins[row] * x.token : row * x.row;
    return static_cast<X*>(x.data) + first + token * x.token + head * x.head;
}

// Hands out pieces of a thread's memory, each on a cache line of its own; with none, it only counts.
template <typename A>
class Memory {
  public:
    explicit Memory(void* memory) : at_(static_cast<A*>(memory)) {}

    A* take(int64_t count) {
        A* piece = at_ == nullptr ? nullptr : at_ + used_;
        used_ += round_up(count, 64 / sizeof(A));
        return piece;
    }
    int64_t bytes() const { return used_ * static_cast<int64_t>(sizeof(A)); }

  private:
    A* at_;
    int64_t used_ = 0;
};

INTERFORMER_LEVEL_END
