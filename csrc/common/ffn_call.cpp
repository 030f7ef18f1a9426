#include "common/ffn_call.h"

namespace interformer {

namespace {

void check_inputs(const Checks& check, const FfnInputs& in) {
    check.floating("x", in.x);
    check.tensor("x", in.x, in.x.dtype, {{"T"}, {"E"}});
    check.offsets("offsets", in.offsets);
    const int64_t rows = in.offsets.shape[0] - 1;
    check.tensor("weight", in.weight, in.x.dtype, {{"B", rows}, {"E", in.x.shape[1]}, {"F"}});
    if (in.bias) check.tensor("bias", *in.bias, in.x.dtype, {{"B", rows}, {"F", in.weight.shape[2]}});
}

}  // namespace

void check_forward(const Checks& check, const FfnInputs& in, const FfnOutputs& outputs) {
    check_inputs(check, in);
    const int64_t tokens = in.x.shape[0], F = in.weight.shape[2];
    check.tensor("out", outputs.out, in.x.dtype, {{"T", tokens}, {"F", F}});
    check.contiguous("out", outputs.out);
    if (outputs.residual) check.tensor("residual", *outputs.residual, in.x.dtype, {{"T", tokens}, {"F", F}});
}

void check_backward(const Checks& check, const FfnInputs& in, const FfnGradients& grads) {
    check_inputs(check, in);
    check.tensor("grad_out", grads.grad_out, in.x.dtype, {{"T", in.x.shape[0]}, {"F", in.weight.shape[2]}});
    check.gradient("grad_x", grads.grad_x, "x", in.x);
    check.gradient("grad_weight", grads.grad_weight, "weight", in.weight);
    if (in.bias.has_value() != grads.grad_bias.has_value())
        check.refuse("grad_bias", in.bias ? "given" : "None", grads.grad_bias ? describe(*grads.grad_bias) : "None");
    if (in.bias) check.gradient("grad_bias", *grads.grad_bias, "bias", *in.bias);
}

}  // namespace interformer
