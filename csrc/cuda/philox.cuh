// Philox4x32 of 7 rounds (Salmon et al., 2011): random words by their number.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace interformer {
namespace cuda {

// Four random words.
struct RandomWords {
    uint32_t words[4];

    // Without an index at run time, for which an array would lie in local memory.
    __device__ uint32_t operator[](uint32_t i) const {
        const uint32_t low = i & 1 ? words[1] : words[0], high = i & 1 ? words[3] : words[2];
        return i & 2 ? high : low;
    }
};

// The words of a counter, given as three numbers, under a key.
__device__ inline RandomWords philox(uint32_t first, uint32_t second, uint64_t third, uint64_t key) {
    uint32_t c0 = first, c1 = second, c2 = static_cast<uint32_t>(third), c3 = static_cast<uint32_t>(third >> 32);
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma unroll
    for (int round = 0; round < 7; ++round) {
        const uint64_t left = uint64_t{0xD2511F53u} * c0, right = uint64_t{0xCD9E8D57u} * c2;
        c0 = static_cast<uint32_t>(right >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32_t>(right);
        c2 = static_cast<uint32_t>(left >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32_t>(left);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

}  // namespace cuda
}  // namespace interformer
