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

// Tables must be float32 [P, R/2] with P >= 1 and R <= head_size.
inline void check_tables(const Checks& check, const TensorView& cos, const TensorView& sin, int64_t head_size) {
    check.tensor("cos", cos, DType::float32, {{"P"}, {"R/2"}});
    check.contiguous_last_axis("cos", cos);
    check.tensor("sin", sin, DType::float32, {{"P", cos.shape[0]}, {"R/2", cos.shape[1]}});
    check.contiguous_last_axis("sin", sin);
    if (cos.shape[0] < 1 || 2 * cos.shape[1] > head_size)
        check.refuse("cos", "[P, R/2] with P >= 1 and R <= D", describe(cos));
}

// Positions, where given, must be one for each token.
inline void check_positions(const Checks& check, const char* argument, const std::optional<TensorView>& positions,
                            int64_t tokens) {
    if (!positions) return;
    check.index(argument, *positions);
    if (positions->shape[0] != tokens) check.refuse(argument, "one for each token", describe(*positions));
}

inline void check_call(const Checks& check, const RotaryInputs& in, const RotaryOutputs& outputs) {
    const TensorView& x = in.x;
    check.floating("x", x);
    check.tensor("x", x, x.dtype, {{"T"}, {"H"}, {"D"}});
    check.offsets("offsets", in.offsets);
    check.gradient("out", outputs.out, "x", x);
    check_tables(check, in.cos, in.sin, x.shape[2]);
    check_positions(check, "positions", in.positions, x.shape[0]);
}

}  // namespace interformer
