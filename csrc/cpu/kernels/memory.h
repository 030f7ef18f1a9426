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

// Tokens that are soon read, as many bytes each, `stride` bytes apart: with each token of a pass one of them is fetched
// to the second level of cache. Without data none is.
struct TokensAhead {
    const char* data = nullptr;
    int64_t stride = 0, bytes = 0;

    INTERFORMER_INLINE void fetch(int64_t t) const {
        if (data != nullptr)
            for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(data + t * stride + i, 0, 2);
    }
};

// `count` such tokens, fetched range by range.
struct RangeAhead {
    TokensAhead tokens;
    int64_t count = 0;

    RangeAhead from(int64_t token) const {
        return {{tokens.data + token * tokens.stride, tokens.stride, tokens.bytes}, count - token};
    }

    INTERFORMER_INLINE void fetch(int64_t begin, int64_t end) const {
        for (const int64_t last = end < count ? end : count; begin < last; ++begin) tokens.fetch(begin);
    }
};

// The tokens under one head; none where heads share a cache line, which the others' tokens bring.
template <typename T>
inline RangeAhead head_ahead(const RowTensor& x, int64_t row, int64_t head, int64_t count, int64_t channels) {
    constexpr int64_t kSize = static_cast<int64_t>(sizeof(T)), kLine = 64;
    if (channels * kSize < kLine) return {};
    return {{reinterpret_cast<const char*>(address<T>(x, row, 0, head)), x.token * kSize, channels * kSize}, count};
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
