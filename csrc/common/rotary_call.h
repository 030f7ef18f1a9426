// A call of `apply_rotary`, as every backend takes it, and what is checked of it and of rotary tables anywhere.
#pragma once

#include <cstdint>
#include <optional>

#include "common/checks.h"
#include "common/tensor_view.h"

namespace interformer {

struct RotaryCall {
    TensorView x, offsets, cos, sin;      // [T, H, D], [B + 1], [P, R/2] twice
    std::optional<TensorView> positions;  // [T]
    bool interleaved, backwards;
    TensorView out;  // written
};

void check_call(const Checks& check, const RotaryCall& call);

// Tables float32 [P, R/2] with P >= 1 and R <= head_size.
void check_tables(const Checks& check, const TensorView& cos, const TensorView& sin, int64_t head_size);
// One position for each token, where given.
void check_positions(const Checks& check, const char* argument, const std::optional<TensorView>& positions,
                     int64_t tokens);

}  // namespace interformer
