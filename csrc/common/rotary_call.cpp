#include "common/rotary_call.h"

namespace interformer {

void check_tables(const Checks& check, const TensorView& cos, const TensorView& sin, int64_t head_size) {
    check.tensor("cos", cos, DType::float32, {{"P"}, {"R/2"}});
    check.contiguous_last_axis("cos", cos);
    check.tensor("sin", sin, DType::float32, {{"P", cos.shape[0]}, {"R/2", cos.shape[1]}});
    check.contiguous_last_axis("sin", sin);
    if (cos.shape[0] < 1 || 2 * cos.shape[1] > head_size)
        check.refuse("cos", "[P, R/2] with P >= 1 and R <= D", describe(cos));
}

void check_positions(const Checks& check, const char* argument, const std::optional<TensorView>& positions,
                     int64_t tokens) {
    if (!positions) return;
    check.index(argument, *positions);
    if (positions->shape[0] != tokens) check.refuse(argument, "one for each token", describe(*positions));
}

void check_call(const Checks& check, const RotaryInputs& in, const RotaryOutputs& outputs) {
    const TensorView& x = in.x;
    check.floating("x", x);
    check.tensor("x", x, x.dtype, {{"T"}, {"H"}, {"D"}});
    check.offsets("offsets", in.offsets);
    check.gradient("out", outputs.out, "x", x);
    check_tables(check, in.cos, in.sin, x.shape[2]);
    check_positions(check, "positions", in.positions, x.shape[0]);
}

}  // namespace interformer
