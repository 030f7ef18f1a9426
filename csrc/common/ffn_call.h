// A call of `personalized_ffn`, the same for every backend, and its checks.
#pragma once

#include <optional>

#include "common/activation_names.h"
#include "common/checks.h"
#include "common/tensor_view.h"

namespace interformer {

struct FfnInputs {
    TensorView x;                    // [T, E]
    TensorView weight;               // [B, E, F]
    TensorView offsets;              // [B + 1]
    std::optional<TensorView> bias;  // [B, F]
    Activation activation;
};

struct FfnOutputs {
    std::optional<TensorView> residual;  // [T, F], read
    TensorView out;                      // [T, F]
};

struct FfnGradients {
    TensorView grad_out;                  // [T, F], read
    TensorView grad_x, grad_weight;       // shaped like x and weight
    std::optional<TensorView> grad_bias;  // shaped like bias
};

template <typename Reader>
void read(Reader& next, FfnInputs& in) {
    next.tensor("x", in.x);
    next.tensor("weight", in.weight);
    next.tensor("offsets", in.offsets);
    next.optional("bias", in.bias);
    in.activation = next.choice("activation", parse_activation);
}

template <typename Reader>
void read(Reader& next, FfnOutputs& outputs) {
    next.optional("residual", outputs.residual);
    next.tensor("out", outputs.out);
}

template <typename Reader>
void read(Reader& next, FfnGradients& grads) {
    next.tensor("grad_out", grads.grad_out);
    next.tensor("grad_x", grads.grad_x);
    next.tensor("grad_weight", grads.grad_weight);
    next.optional("grad_bias", grads.grad_bias);
}

inline void check_ffn(const Checks& check, const FfnInputs& in) {
    check.floating("x", in.x);
    check.tensor("x", in.x, in.x.dtype, {{"T"}, {"E"}});
    check.offsets("offsets", in.offsets);
    const int64_t rows = in.offsets.shape[0] - 1;
    check.tensor("weight", in.weight, in.x.dtype, {{"B", rows}, {"E", in.x.shape[1]}, {"F"}});
    if (in.bias) check.tensor("bias", *in.bias, in.x.dtype, {{"B", rows}, {"F", in.weight.shape[2]}});
}

inline void check_forward(const Checks& check, const FfnInputs& in, const FfnOutputs& outputs) {
    check_ffn(check, in);
    const int64_t tokens = in.x.shape[0], F = in.weight.shape[2];
    check.tensor("out", outputs.out, in.x.dtype, {{"T", tokens}, {"F", F}});
    check.contiguous("out", outputs.out);
    if (outputs.residual) check.tensor("residual", *outputs.residual, in.x.dtype, {{"T", tokens}, {"F", F}});
}

inline void check_backward(const Checks& check, const FfnInputs& in, const FfnGradients& grads) {
    check_ffn(check, in);
    check.tensor("grad_out", grads.grad_out, in.x.dtype, {{"T", in.x.shape[0]}, {"F", in.weight.shape[2]}});
    check.gradient("grad_x", grads.grad_x, "x", in.x);
    check.gradient("grad_weight", grads.grad_weight, "weight", in.weight);
    if (in.bias.has_value() != grads.grad_bias.has_value())
        check.refuse("grad_bias", in.bias ? "given" : "None", grads.grad_bias ? describe(*grads.grad_bias) : "None");
    if (in.bias) check.gradient("grad_bias", *grads.grad_bias, "bias", *in.bias);
}

}  // namespace interformer
