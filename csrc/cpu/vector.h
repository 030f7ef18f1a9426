// Sums over channels. The order of summation is written out, so that neither alignment nor compiler changes a bit.
#pragma once

#include <cstdint>

namespace interformer {

// <x, y>: kLanes interleaved partial sums, then these in halves.
template <typename A>
A dot(const A* x, const A* y, int64_t count) {
    constexpr int64_t kLanes = 64 / sizeof(A);
    A lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        for (int64_t j = 0; j < kLanes; ++j) lanes[j] += x[i + j] * y[i + j];
    for (int64_t j = 0; i + j < count; ++j) lanes[j] += x[i + j] * y[i + j];
    for (int64_t half = kLanes / 2; half > 0; half /= 2)
        for (int64_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
    return lanes[0];
}

// to += factor * x
template <typename A>
void add_scaled(A factor, const A* __restrict x, int64_t count, A* __restrict to) {
    for (int64_t i = 0; i < count; ++i) to[i] += factor * x[i];
}

}  // namespace interformer
