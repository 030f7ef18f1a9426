// `pma_pooling` of projected tokens on the CPU, with the projections folded into seeds and output (docs/ops.md).
#pragma once

#include <cstdint>
#include <optional>

#include "common/tensor_view.h"

namespace interformer {

struct FoldedInputs {
    TensorView seeds;                      // [M, H, D]
    TensorView key_weight, value_weight;   // [H * D, E]
    std::optional<TensorView> value_bias;  // [H * D]
    TensorView x;                          // [T, E]
    TensorView offsets;                    // [B + 1]
    double scale;
};

struct FoldedOutputs {
    TensorView out;                    // [B, M, H, D]
    std::optional<TensorView> pooled;  // [B, M, H, E], the pooled raw tokens
};

template <typename Reader>
void read(Reader& next, FoldedInputs& in) {
    next.tensor("seeds", in.seeds);
    next.tensor("key_weight", in.key_weight);
    next.tensor("value_weight", in.value_weight);
    next.optional("value_bias", in.value_bias);
    next.tensor("x", in.x);
    next.tensor("offsets", in.offsets);
    in.scale = next.number("scale");
}

template <typename Reader>
void read(Reader& next, FoldedOutputs& outputs) {
    next.tensor("out", outputs.out);
    next.optional("pooled", outputs.pooled);
}

void folded_pooling_forward(const FoldedInputs& in, const FoldedOutputs& outputs, int64_t threads);

}  // namespace interformer
