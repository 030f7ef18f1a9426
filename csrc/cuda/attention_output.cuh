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
    float* attn_out;                     // null: not kept
    float* lse;                          // null: without softmax
    bool out_aligned, attn_out_aligned;  // vectors of four numbers are
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

    // One more score, which has no value. Sums over values so far are to be multiplied by the result.
    __device__ float add_sink(float sink) {
        const float before = row_max;
        row_max = fmaxf(row_max, sink);
        const float base = fmaxf(row_max, -kLargest<float>), factor = exp2f((before - base) * kLog2E);
        row_sum = row_sum * factor + prob_scale * exp2f((sink - base) * kLog2E);
        return factor;
    }

    // For a query that sees some key: where all its scores are -inf, the mean is NaN, as in PyTorch.
    __device__ void nan_if_zero() {
        if (row_sum == 0.0f) row_sum = NAN;
    }
};

// Writes one query's log-sum-exp, where there is a softmax.
template <typename T>
__device__ inline void write_lse(const Epilogue<T>& e, const OutputPlace& at, const RowStats& stats) {
    if (e.lse == nullptr) return;
    const float divisor = stats.row_sum != 0.0f ? stats.row_sum : 1.0f;
    e.lse[at.place] = stats.row_max + log2f(divisor / stats.prob_scale) * kLn2;
}

// Writes four of one query's outputs, from channel `c` on. `sums` are probabilities times values over all its keys.
template <typename T>
__device__ inline void write_outputs(const Epilogue<T>& e, const OutputPlace& at, int c, int channels,
                                     const RowStats& stats, const Four& sums) {
    const int count = min(channels - c, 4);
    const bool is_mean = stats.row_sum != 0.0f;
    const float divisor = is_mean ? stats.row_sum : 1.0f;
    Four y;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float x = sums.values[i];
        y.values[i] = x / divisor;
        // A mean lies among its values; rounding could carry it beyond the largest number.
        if (is_mean & (fabsf(x) <= kLargest<float>))
            y.values[i] = y.values[i] > kLargest<T>    ? kLargest<T>
                          : y.values[i] < -kLargest<T> ? -kLargest<T>
                                                       : y.values[i];
    }
    const int64_t place = at.place * channels + c;
    if (e.attn_out != nullptr) store_four(e.attn_out + place, y, count, e.attn_out_aligned);
    if (e.gate.data != nullptr && at.in_row) {
        const T* from = e.gate.at(at.row, at.token, at.head) + c * e.gate.channel;
        Four gate = load_four(from, e.gate.channel, count, e.gate.aligned);
        map_four(y, gate, [&](float x, float g) {
            const float mapped = activate(e.gating.inside ? x * g : g, e.gating.activation);
            return e.gating.inside ? mapped : x * mapped;
        });
    }
    if (e.residual.data != nullptr && at.in_row) {
        const T* from = e.residual.at(at.row, at.token, at.head) + c * e.residual.channel;
        const Four residual = load_four(from, e.residual.channel, count, e.residual.aligned);
#pragma unroll
        for (int i = 0; i < 4; ++i) y.values[i] += residual.values[i];
    }
    store_four(e.out + place, at.in_row ? y : Four{}, count, e.out_aligned);
}

}  // namespace cuda
}  // namespace interformer
