// What the attention kernels want of their arguments.
#pragma once

#include "common/checks.h"
#include "cpu/attention.h"

namespace interformer {

void check_inputs(const Checks& check, const AttentionInputs& in);
void check_outputs(const Checks& check, const AttentionInputs& in, const AttentionOutputs& to);
void check_gradients(const Checks& check, const AttentionInputs& in, const AttentionGradients& grads);

}  // namespace interformer
