// What becomes of attended values: the log-sum-exp, the gate and the residual.
#pragma once

#include <cstdint>

#include "cuda/attention_tiles.cuh"

namespace interformer {
namespace cuda {

template <typename T>
struct Epilogue {
    Heads<const T> gate, residual;  // null: none
    Gate gating;
    T *out, *attended;  // not to be kept: null
    float* lse;         // without softmax: null
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

// One query's outputs, by a warp. `sum(channel)` is a sum over all its keys: of weights that are relative to the
// `largest` score and add up to `total`, or, without softmax, of the weights themselves (`total` is 0 then).
template <typename T, typename Sum>
__device__ inline void finish_query(const Epilogue<T>& e, const OutputPlace& at, int channels, float largest,
                                    float total, Sum&& sum) {
    // A sum over no key is zero, and stays so.
    const float divisor = total == 0.0f ? 1.0f : total;
    if (e.lse != nullptr && lane_index() == 0) e.lse[at.place] = largest + log2f(divisor) * kLn2;
    const T* gate = e.gate.data == nullptr || !at.held ? nullptr : e.gate.at(at.row, at.token, at.head);
    const T* residual = e.residual.data == nullptr || !at.held ? nullptr : e.residual.at(at.row, at.token, at.head);
#pragma unroll 1
    for (int c = lane_index(); c < channels; c += kWarp) {
        float y = sum(c) / divisor;
        if (e.attended != nullptr) e.attended[at.place * channels + c] = narrow<T>(y);
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
