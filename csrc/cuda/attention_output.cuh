// The end of the forward: log-sum-exp, gate and residual.
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
    float* attn_out;  // null: not kept
    float* lse;       // null: without softmax
};

// A query of the output: token `token` of row `row` in tensors of the queries' layout, and number `place` among the
// heads of all tokens. Tokens of the tail are not `in_row`.
struct OutputPlace {
    int64_t row, token, place;
    int head;
    bool in_row;

    __device__ OutputPlace(const Queries& queries, PackedRow query, int heads, bool in_row)
        : row(queries.row),
          token(queries.origin + query.token),
          place((queries.first + query.token) * heads + query.head),
          head(query.head),
          in_row(in_row) {}
};

// The unnormalised probability of a query's largest score, among `keys` keys. With it, probabilities sum up to less
// than a half, so their sums over values are finite where the values are, up to the largest number. As a power of two
// it changes no digit. float16 needs none: its float32 sums cannot overflow, but small probabilities, as float16
// operands, would lose digits.
template <typename T>
__device__ inline float prob_scale_for(int keys) {
    if constexpr (std::is_same_v<T, Float16>) return 1.0f;
    const unsigned exponent = __float_as_uint(static_cast<float>(max(keys, 1))) & 0x7f800000u;
    return __uint_as_float((252u << 23) - exponent);
}

// Softmax statistics of one query: probabilities are `prob_scale` times the exponential of a score's distance from
// `row_max`, and `row_sum` is their sum. Without softmax, and where all keys are masked, `row_sum` is zero.
struct RowStats {
    float row_max, row_sum, prob_scale;

    // For a query that sees some key: where all its scores are -inf, the mean is NaN, as in PyTorch.
    __device__ void nan_if_zero() {
        if (row_sum == 0.0f) row_sum = NAN;
    }
};

// Writes one query's outputs, by a warp. `sum(channel)` is the sum of probabilities times values over all its keys.
template <typename T, typename Sum>
__device__ inline void write_output(const Epilogue<T>& e, const OutputPlace& at, int channels, const RowStats& stats,
                                    Sum&& sum) {
    const bool is_mean = stats.row_sum != 0.0f;
    const float divisor = is_mean ? stats.row_sum : 1.0f;
    if (e.lse != nullptr && lane_index() == 0)
        e.lse[at.place] = stats.row_max + log2f(divisor / stats.prob_scale) * kLn2;
    const T* gate = e.gate.data == nullptr || !at.in_row ? nullptr : e.gate.at(at.row, at.token, at.head);
    const T* residual = e.residual.data == nullptr || !at.in_row ? nullptr : e.residual.at(at.row, at.token, at.head);
#pragma unroll 1
    for (int c = lane_index(); c < channels; c += kWarp) {
        const float x = sum(c);
        float y = x / divisor;
        // A mean lies among its values; rounding could carry it beyond the largest number.
        if (is_mean && fabsf(x) <= kLargest<float>)
            y = y > kLargest<T> ? kLargest<T> : y < -kLargest<T> ? -kLargest<T> : y;
        if (e.attn_out != nullptr) e.attn_out[at.place * channels + c] = y;
        if (gate != nullptr) {
            const float g = widen(gate[c * e.gate.channel]);
            const float x = activate(e.gating.inside ? y * g : g, e.gating.activation);
            y = e.gating.inside ? x : y * x;
        }
        if (residual != nullptr) y += widen(residual[c * e.residual.channel]);
        e.out[at.place * channels + c] = narrow<T>(at.in_row ? y : 0.0f);
    }
}

}  // namespace cuda
}  // namespace interformer
