#include "common/attention_call.h"

#include <stdexcept>
#include <string>

#include "common/rotary_call.h"

namespace interformer {

QueryLayout parse_query_layout(const std::string& name) {
    if (name == "packed") return QueryLayout::packed;
    if (name == "dense") return QueryLayout::dense;
    if (name == "shared") return QueryLayout::shared;
    throw std::invalid_argument("layout must be packed, dense or shared, found " + name);
}

void check_like_output(const Checks& check, const AttentionInputs& in, const char* argument, const TensorView& x,
                       DType dtype, std::optional<Axis> last) {
    const int64_t* q = in.q.shape;
    const int64_t rows = in.kv_offsets.shape[0] - 1;
    if (in.layout == QueryLayout::packed) {
        if (last) return check.tensor(argument, x, dtype, {{"Tq", q[0]}, {"H", q[1]}, *last});
        return check.tensor(argument, x, dtype, {{"Tq", q[0]}, {"H", q[1]}});
    }
    const int64_t n = q[in.q.axes - 3], heads = q[in.q.axes - 2];
    if (last) return check.tensor(argument, x, dtype, {{"B", rows}, {"N", n}, {"H", heads}, *last});
    check.tensor(argument, x, dtype, {{"B", rows}, {"N", n}, {"H", heads}});
}

Axis value_axis(const AttentionInputs& in) {
    return {"Dv", (in.v ? *in.v : in.k).shape[2]};
}

void check_pair(const Checks& check, const char* argument, bool expected, const std::optional<TensorView>& given) {
    if (expected == given.has_value()) return;
    check.refuse(argument, expected ? "given" : "None", given ? describe(*given) : "None");
}

namespace {

void check_rope(const Checks& check, const AttentionInputs& in) {
    if (!in.cos) return;
    if (!in.sin) check.refuse("sin", "given with cos", "None");
    check_tables(check, *in.cos, *in.sin, in.k.shape[2]);
    if (in.layout != QueryLayout::packed) check.refuse("cos", "None unless queries are packed", describe(*in.cos));
    check_positions(check, "positions_q", in.positions_q, in.q.shape[0]);
    check_positions(check, "positions_k", in.positions_k, in.k.shape[0]);
}

void check_layout(const Checks& check, const AttentionInputs& in) {
    const DType dtype = in.k.dtype;
    const int64_t rows = in.kv_offsets.shape[0] - 1, D = in.k.shape[2];
    switch (in.layout) {
        case QueryLayout::packed:
            check.tensor("q", in.q, dtype, {{"Tq"}, {"H"}, {"D", D}});
            if (in.q_offsets) {
                check.index("q_offsets", *in.q_offsets);
                if (in.q_offsets->shape[0] != rows + 1) check.refuse("q_offsets", "[B+1]", describe(*in.q_offsets));
            } else if (in.q.shape[0] != in.k.shape[0]) {
                check.refuse("q", "of k's tokens, or with q_offsets", describe(in.q));
            }
            return;
        case QueryLayout::dense:
            return check.tensor("q", in.q, dtype, {{"B", rows}, {"N"}, {"H"}, {"D", D}});
        case QueryLayout::shared:
            return check.tensor("q", in.q, dtype, {{"M"}, {"H"}, {"D", D}});
    }
}

DType accumulation_dtype(DType dtype) {
    return dtype == DType::float64 ? DType::float64 : DType::float32;
}

void check_gate_gradient(const Checks& check, const AttentionInputs& in, const TensorView& grad) {
    const TensorView& gate = *in.gate;
    const DType acc_dtype = accumulation_dtype(in.k.dtype);
    if (grad.axes == 3)
        check.tensor("grad_gate", grad, acc_dtype, {{"Tq or 1"}, {"H or 1"}, {"Dv or 1"}});
    else
        check.tensor("grad_gate", grad, acc_dtype, {{"B or 1"}, {"N or 1"}, {"H or 1"}, {"Dv or 1"}});
    check.contiguous("grad_gate", grad);
    for (int axis = 0; axis < grad.axes; ++axis)
        if (grad.axes != gate.axes || (grad.shape[axis] != 1 && grad.shape[axis] != gate.shape[axis]))
            check.refuse("grad_gate", "of size 1 or the output's on every axis", describe(grad));
}

}  // namespace

void check_inputs(const Checks& check, const AttentionInputs& in) {
    check.floating("k", in.k);
    const DType dtype = in.k.dtype;
    check.tensor("k", in.k, dtype, {{"Tk"}, {"Hk"}, {"D"}});
    check.contiguous_last_axis("k", in.k);
    check.offsets("kv_offsets", in.kv_offsets);
    if (in.v) {
        check.tensor("v", *in.v, dtype, {{"Tk", in.k.shape[0]}, {"Hk", in.k.shape[1]}, {"Dv"}});
        check.contiguous_last_axis("v", *in.v);
    }
    check_layout(check, in);
    const int64_t heads = in.q.shape[in.q.axes - 2], kv_heads = in.k.shape[1];
    if (kv_heads < 1 || heads < 1 || heads % kv_heads != 0)
        check.refuse("q", "of a number of heads that k's " + std::to_string(kv_heads) + " divides", describe(in.q));
    if (in.k.shape[2] < 1 || value_axis(in).size < 1) check.refuse("k", "of at least one channel", describe(in.k));
    check_rope(check, in);
    check_variant(check, in.variant);
    if (in.gate) check_like_output(check, in, "gate", *in.gate, dtype, value_axis(in));
    if (in.skip_prefix < 0) check.refuse("skip_prefix", "at least 0", std::to_string(in.skip_prefix));
}

void check_outputs(const Checks& check, const AttentionInputs& in, const AttentionOutputs& outputs) {
    const DType dtype = in.k.dtype;
    check_like_output(check, in, "out", outputs.out, dtype, value_axis(in));
    check.contiguous("out", outputs.out);
    if (outputs.residual) check_like_output(check, in, "residual", *outputs.residual, dtype, value_axis(in));
    if (outputs.attn_out) {
        check_like_output(check, in, "attn_out", *outputs.attn_out, accumulation_dtype(dtype), value_axis(in));
        check.contiguous("attn_out", *outputs.attn_out);
    }
    if (!outputs.lse) return;
    check_like_output(check, in, "lse", *outputs.lse, accumulation_dtype(dtype), std::nullopt);
    check.contiguous("lse", *outputs.lse);
    if (!in.variant.score.softmax) check.refuse("lse", "None without softmax", describe(*outputs.lse));
}

void check_key_gradients(const Checks& check, const AttentionInputs& in, const AttentionGradients& grads) {
    check.gradient("grad_k", grads.grad_k, "k", in.k);
    check_pair(check, "grad_v", in.v.has_value(), grads.grad_v);
    if (in.v) check.gradient("grad_v", *grads.grad_v, "v", *in.v);
    check_gradients(check, in.variant, grads.variant);
}

void check_lse_gradient(const Checks& check, const AttentionInputs& in, const AttentionGradients& grads) {
    if (!grads.grad_lse) return;
    check_like_output(check, in, "grad_lse", *grads.grad_lse, accumulation_dtype(in.k.dtype), std::nullopt);
    if (!in.variant.score.softmax) check.refuse("grad_lse", "None without softmax", describe(*grads.grad_lse));
}

void check_gradients(const Checks& check, const AttentionInputs& in, const AttentionGradients& grads) {
    const DType dtype = in.k.dtype;
    check_like_output(check, in, "grad_out", grads.grad_out, dtype, value_axis(in));
    if (in.layout == QueryLayout::shared) {
        const int64_t* q = in.q.shape;
        check.tensor("grad_q", grads.grad_q, accumulation_dtype(dtype), {{"M", q[0]}, {"H", q[1]}, {"D", q[2]}});
        check.contiguous("grad_q", grads.grad_q);
    } else {
        check.gradient("grad_q", grads.grad_q, "q", in.q);
    }
    check_key_gradients(check, in, grads);
    check_lse_gradient(check, in, grads);
    check_pair(check, "attn_out", in.gate.has_value(), grads.attn_out);
    check_pair(check, "grad_gate", in.gate.has_value(), grads.grad_gate);
    if (!in.gate) return;
    check_like_output(check, in, "attn_out", *grads.attn_out, accumulation_dtype(dtype), value_axis(in));
    check_gate_gradient(check, in, *grads.grad_gate);
}

}  // namespace interformer
