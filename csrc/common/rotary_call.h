// A call of `apply_rotary`, the same for every backend, its checks, and those of rotary tables in any op.
#pragma once

#include <cstdint>
#include <optional>

#include "common/checks.h"
#include "common/tensor_view.h"

namespace interformer {

struct RotaryInputs {
    TensorView x, offsets, cos, sin;      // [T, H, D], [B + 1], [P, R/2] twice
    std::optional<TensorView> positions;  // [T]
    bool interleaved;
};

struct RotaryOutputs {
    TensorView out;  // [T, H, D]
    bool backwards;  // out is x turned back
};

template <typename Reader>
void read(Reader& next, RotaryInputs& in) {
    next.tensor("x", in.x);
    next.tensor("offsets", in.offsets);
    next.tensor("cos", in.cos);
    next.tensor("sin", in.sin);
    next.optional("positions", in.positions);
    in.interleaved = next.boolean("interleaved");
}

template <typename Reader>
void read(Reader& next, RotaryOutputs& outputs) {
    next.tensor("out", outputs.out);
    outputs.backwards = next.boolean("backwards");
}

void check_call(const Checks& check, const RotaryInputs& in, const RotaryOutputs& outputs);

// Tables must be float32 [P, R/2] with P >= 1 and R <= head_size.
void check_tables(const Checks& check, const TensorView& cos, const TensorView& sin, int64_t head_size);
// Positions, where given, must be one for each token.
void check_positions(const Checks& check, const char* argument, const std::optional<TensorView>& positions,
                     int64_t tokens);

}  // namespace interformer
