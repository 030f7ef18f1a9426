// A call of `jagged_weighted_sum`, the same for every backend, and its checks.
#pragma once

#include "common/checks.h"
#include "common/tensor_view.h"

namespace interformer {

struct WeightedSumInputs {
    TensorView weights, v, offsets;  // [T, H], [T, H, D], [B + 1]
};

struct WeightedSumOutputs {
    TensorView out;  // [B, H, D]
};

struct WeightedSumGradients {
    TensorView grad_out;              // [B, H, D], read
    TensorView grad_weights, grad_v;  // shaped like weights and v
};

template <typename Reader>
void read(Reader& next, WeightedSumInputs& in) {
    next.tensor("weights", in.weights);
    next.tensor("v", in.v);
    next.tensor("offsets", in.offsets);
}

template <typename Reader>
void read(Reader& next, WeightedSumOutputs& outputs) {
    next.tensor("out", outputs.out);
}

template <typename Reader>
void read(Reader& next, WeightedSumGradients& grads) {
    next.tensor("grad_out", grads.grad_out);
    next.tensor("grad_weights", grads.grad_weights);
    next.tensor("grad_v", grads.grad_v);
}

inline void check_weighted_sum(const Checks& check, const WeightedSumInputs& in) {
    check.floating("v", in.v);
    check.tensor("v", in.v, in.v.dtype, {{"T"}, {"H"}, {"D"}});
    check.contiguous_last_axis("v", in.v);
    check.tensor("weights", in.weights, in.v.dtype, {{"T", in.v.shape[0]}, {"H", in.v.shape[1]}});
    check.contiguous_last_axis("weights", in.weights);
    check.offsets("offsets", in.offsets);
}

// `out` or its gradient.
inline void check_sums(const Checks& check, const char* argument, const TensorView& x, const WeightedSumInputs& in) {
    check.tensor(argument, x, in.v.dtype, {{"B", in.offsets.shape[0] - 1}, {"H", in.v.shape[1]}, {"D", in.v.shape[2]}});
}

inline void check_forward(const Checks& check, const WeightedSumInputs& in, const WeightedSumOutputs& outputs) {
    check_weighted_sum(check, in);
    check_sums(check, "out", outputs.out, in);
    check.contiguous("out", outputs.out);
}

inline void check_backward(const Checks& check, const WeightedSumInputs& in, const WeightedSumGradients& grads) {
    check_weighted_sum(check, in);
    check_sums(check, "grad_out", grads.grad_out, in);
    check.contiguous_last_axis("grad_out", grads.grad_out);
    check.gradient("grad_weights", grads.grad_weights, "weights", in.weights);
    check.gradient("grad_v", grads.grad_v, "v", in.v);
}

}  // namespace interformer
