// What becomes of attention outputs: the log-sum-exp, the gate and the residual.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/attention_tiles.cuh"

namespace interformer {
namespace cuda {

template <typename T>
struct Epilogue {
    Heads<const T> gate, residual;  // null: none
    Gate gating;
    T* out;
    float* attn_out;  // not to be kept: null
    float* lse;       // without softmax: null
};

// A query of the output: of row `row`, token `token` in tensors of the queries' layout, and the number `place` among
// the heads of all tokens. The tail is not `held` by a row.
struct OutputPlace {
    int64_t row, token, place;
    int head;
    bool held;

    __device__ OutputPlace(const Queries& queries, int n, int head_of_all, int heads, bool held_by_a_row)
        : row(queries.row),
          token(queries.origin + n),
          place((queries.first + n) * heads + head_of_all),
          head(head_of_all),
          held(held_by_a_row) {}
};

// The weight of a query's largest score, among so many keys. Weights then sum up to less than a half, so their sums
// over values are finite where these are, up to the largest number; and being a power of two, it changes no digit.
// float16 is summed up in float32, which is wide enough, but its weights, as operands, are not.
template <typename T>
__device__ inline float unit_weight(int keys) {
    if constexpr (std::is_same_v<T, Float16>) return 1.0f;
    const unsigned exponent = __float_as_uint(static_cast<float>(max(keys, 1))) & 0x7f800000u;
    return __uint_as_float((252u << 23) - exponent);
}

// The softmax's sum of one query: weights are `unit` times the exponential of a score's distance from the `largest`
// one. Without softmax all is zero, as is the sum over no key.
struct Total {
    float largest, sum, unit;

    // Given that some key is seen: where all scores are -inf, weights are not numbers.
    __device__ void of_some_key() {
        if (sum == 0.0f) sum = NAN;
    }
};

// One query's outputs, by a warp. `sum(channel)` is a sum over all its keys, of weights as `total` has them, or,
// without softmax, of the weights themselves.
template <typename T, typename Sum>
__device__ inline void finish_query(const Epilogue<T>& e, const OutputPlace& at, int channels, const Total& total,
                                    Sum&& sum) {
    // A sum over no key is zero, and stays so.
    const bool averages = total.sum != 0.0f;
    const float divisor = averages ? total.sum : 1.0f;
    if (e.lse != nullptr && lane_index() == 0) e.lse[at.place] = total.largest + log2f(divisor / total.unit) * kLn2;
    const T* gate = e.gate.data == nullptr || !at.held ? nullptr : e.gate.at(at.row, at.token, at.head);
    const T* residual = e.residual.data == nullptr || !at.held ? nullptr : e.residual.at(at.row, at.token, at.head);
#pragma unroll 1
    for (int c = lane_index(); c < channels; c += kWarp) {
        const float x = sum(c);
        float y = x / divisor;
        // A mean is not beyond its values; rounded, it could be.
        if (averages && fabsf(x) <= kLargest<float>)
            y = y > kLargest<T> ? kLargest<T> : y < -kLargest<T> ? -kLargest<T> : y;
        if (e.attn_out != nullptr) e.attn_out[at.place * channels + c] = y;
        if (gate != nullptr) {
            const float g = widen(gate[c * e.gate.channel]);
            const float x = activate(e.gating.inside ? y * g : g, e.gating.activation);
            y = e.gating.inside ? x : y * x;
        }
        if (residual != nullptr) y += widen(residual[c * e.residual.channel]);
        e.out[at.place * channels + c] = narrow<T>(at.held ? y : 0.0f);
    }
}

}  // namespace cuda
}  // namespace interformer
