// A call of `jagged_softmax`, the same for every backend, and its checks.
#pragma once

#include "common/checks.h"
#include "common/tensor_view.h"

namespace interformer {

struct SoftmaxInputs {
    TensorView scores, offsets;  // [T, H], [B + 1]
};

struct SoftmaxOutputs {
    TensorView out;  // [T, H]
};

struct SoftmaxGradients {
    TensorView grad_out, grad_scores;  // [T, H], the first one read
};

template <typename Reader>
void read(Reader& next, SoftmaxInputs& in) {
    next.tensor("scores", in.scores);
    next.tensor("offsets", in.offsets);
}

template <typename Reader>
void read(Reader& next, SoftmaxOutputs& outputs) {
    next.tensor("out", outputs.out);
}

template <typename Reader>
void read(Reader& next, SoftmaxGradients& grads) {
    next.tensor("grad_out", grads.grad_out);
    next.tensor("grad_scores", grads.grad_scores);
}

inline void check_softmax(const Checks& check, const SoftmaxInputs& in) {
    check.floating("scores", in.scores);
    check.tensor("scores", in.scores, in.scores.dtype, {{"T"}, {"H"}});
    check.contiguous_last_axis("scores", in.scores);
    check.offsets("offsets", in.offsets);
}

inline void check_forward(const Checks& check, const SoftmaxInputs& in, const SoftmaxOutputs& outputs) {
    check_softmax(check, in);
    check.gradient("out", outputs.out, "scores", in.scores);
}

inline void check_backward(const Checks& check, const SoftmaxInputs& in, const SoftmaxGradients& grads) {
    check_softmax(check, in);
    check.like("grad_out", grads.grad_out, "scores", in.scores);
    check.contiguous_last_axis("grad_out", grads.grad_out);
    check.gradient("grad_scores", grads.grad_scores, "scores", in.scores);
}

}  // namespace interformer
