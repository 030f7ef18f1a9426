// `personalized_ffn` of docs/ops.md on a GPU: y_t = act(x_t W_b + bias_b) (+ residual_t) for every token t of row b.
#pragma once

#include <optional>

#include "common/ffn_call.h"
#include "cuda/stream.h"

namespace interformer {
namespace cuda {

// `tf32`: float32 may be multiplied by tensor cores.
void personalized_ffn_forward(const FfnInputs& in, const FfnOutputs& to, bool tf32, const Stream& stream);
// Rows of more than `split` tokens (a multiple of 32) are cut into chunks of so many, whose sums need memory where
// there are more tokens than that: float32 [2 T / split + 1, E F], and F numbers more with a bias.
struct FfnChunks {
    int64_t split;
    std::optional<TensorView> pieces;
};
// `before`, [T, F], takes the gradient before the activation; just where there is an activation.
void personalized_ffn_backward(const FfnInputs& in, const FfnGradients& grads, const std::optional<TensorView>& before,
                               const FfnChunks& chunks, bool tf32, const Stream& stream);

}  // namespace cuda
}  // namespace interformer
