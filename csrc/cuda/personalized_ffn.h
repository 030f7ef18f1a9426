// `personalized_ffn` of docs/ops.md on a GPU: y_t = act(x_t W_b + bias_b) (+ residual_t) for every token t of row b.
#pragma once

#include <optional>

#include "common/ffn_call.h"
#include "cuda/stream.h"

namespace interformer {
namespace cuda {

struct FfnWorkspace {
    // [T, F]: the gradient before the activation; present only where there is an activation.
    std::optional<TensorView> grad_pre_activation;
    // Rows of more than `split_tokens` tokens (a multiple of 32) are split in the sums of weight gradients. Where there
    // are more tokens than that, each split has a partial: float32 [2 T / split_tokens + 1, E F], and with a bias F
    // numbers more.
    int64_t split_tokens;
    std::optional<TensorView> partials;
};

template <typename Reader>
void read(Reader& next, FfnWorkspace& workspace) {
    next.optional("grad_pre_activation", workspace.grad_pre_activation);
    workspace.split_tokens = next.integer("split_tokens");
    next.optional("partials", workspace.partials);
}

// `tf32`: float32 may be multiplied by tensor cores.
void personalized_ffn_forward(const FfnInputs& in, const FfnOutputs& to, bool tf32, const Stream& stream);
void personalized_ffn_backward(const FfnInputs& in, const FfnGradients& grads, const FfnWorkspace& workspace, bool tf32,
                               const Stream& stream);

}  // namespace cuda
}  // namespace interformer
