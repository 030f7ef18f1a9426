#include "common/attention_call.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/rotary_call.h"

namespace interformer {

QueryLayout parse_query_layout(const std::string& name) {
    if (name == "packed") return QueryLayout::packed;
    if (name == "dense") return QueryLayout::dense;
    if (name == "shared") return QueryLayout::shared;
    throw std::invalid_argument("layout must be packed, dense or shared, found " + name);
}

Prefix parse_prefix(const std::string& name) {
    if (name == "full") return Prefix::full;
    if (name == "keys") return Prefix::keys;
    if (name == "index") return Prefix::index;
    throw std::invalid_argument("prefix must be full, keys or index, found " + name);
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

// A table of numbers by head, or for all heads, in the accumulation type.
void check_bias(const Checks& check, const char* argument, const TensorView& bias, DType dtype, int64_t heads) {
    check.tensor(argument, bias, dtype, {{"H or 1"}, {"entries"}});
    check.contiguous_last_axis(argument, bias);
    if ((bias.shape[0] != heads && bias.shape[0] != 1) || bias.shape[1] < 1)
        check.refuse(argument, "of H = " + std::to_string(heads) + " or 1 heads, with entries", describe(bias));
}

void check_times(const Checks& check, const AttentionInputs& in) {
    const VariantTensors& t = in.variant_tensors;
    for (const auto& [name, x] :
         {std::pair{"times_q", &t.times_q}, {"times_k", &t.times_k}, {"time_edges", &t.time_edges}})
        check_pair(check, name, t.time_bias.has_value(), *x);
    if (!t.time_bias) return;
    if (in.q.axes == 4)
        check.tensor("times_q", *t.times_q, DType::int64, {{"B", in.q.shape[0]}, {"N", in.q.shape[1]}});
    else
        check.tensor("times_q", *t.times_q, DType::int64, {{"Tq", in.q.shape[0]}});
    check.tensor("times_k", *t.times_k, DType::int64, {{"Tk", in.k.shape[0]}});
    check.tensor("time_edges", *t.time_edges, DType::int64, {{"N - 1", t.time_bias->shape[1] - 1}});
    for (const auto& [name, x] :
         {std::pair{"times_q", &t.times_q}, {"times_k", &t.times_k}, {"time_edges", &t.time_edges}})
        check.contiguous(name, **x);
}

void check_variant_tensors(const Checks& check, const AttentionInputs& in) {
    const VariantTensors& t = in.variant_tensors;
    const int64_t heads = in.q.shape[in.q.axes - 2];
    const DType exact = accumulation_dtype(in.k.dtype);
    const auto packed_only = [&](const char* argument, bool given) {
        if (given && in.layout != QueryLayout::packed)
            check.refuse(argument, "its default unless queries are packed", "another");
    };
    packed_only("num_targets", t.num_targets.has_value());
    packed_only("full_tail", in.variant.full_tail != 0);
    packed_only("prefix", in.variant.prefix != Prefix::full);
    if (t.num_targets) {
        check.index("num_targets", *t.num_targets);
        const int64_t rows = in.kv_offsets.shape[0] - 1;
        if (t.num_targets->shape[0] != rows) check.refuse("num_targets", "[B]", describe(*t.num_targets));
        check.contiguous("num_targets", *t.num_targets);
    }
    if (t.sinks) {
        check.tensor("sinks", *t.sinks, exact, {{"H", heads}});
        check.contiguous("sinks", *t.sinks);
        if (!in.variant.score.softmax) check.refuse("sinks", "None without softmax", describe(*t.sinks));
    }
    for (const auto& [name, bias] : {std::pair{"position_bias", &t.position_bias}, {"time_bias", &t.time_bias}}) {
        if (!*bias) continue;
        check_bias(check, name, **bias, exact, heads);
        if (in.layout == QueryLayout::shared) check.refuse(name, "None where rows share queries", describe(**bias));
    }
    if (t.position_bias && t.position_bias->shape[1] % 2 == 0)
        check.refuse("position_bias", "of 2 P + 1 entries", describe(*t.position_bias));
    check_times(check, in);
    check_pair(check, "dropout_seed", in.variant.drops(), t.dropout_seed);
    if (t.dropout_seed) check.tensor("dropout_seed", *t.dropout_seed, DType::int64, {});
}

// Gradients have the shapes of their tensors.
void check_variant_gradients(const Checks& check, const AttentionInputs& in, const VariantGradients& grads) {
    const VariantTensors& t = in.variant_tensors;
    const auto check_one = [&](const char* argument, const std::optional<TensorView>& grad, const char* of,
                               const std::optional<TensorView>& x) {
        check_pair(check, argument, x.has_value(), grad);
        if (x) check.gradient(argument, *grad, of, *x);
    };
    check_one("grad_sinks", grads.sinks, "sinks", t.sinks);
    check_one("grad_position_bias", grads.position_bias, "position_bias", t.position_bias);
    check_one("grad_time_bias", grads.time_bias, "time_bias", t.time_bias);
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
    check_variant_tensors(check, in);
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
    check_variant_gradients(check, in, grads.variant);
}

void check_lse_gradient(const Checks& check, const AttentionInputs& in, const AttentionGradients& grads) {
    if (!grads.grad_lse) return;
    check_like_output(check, in, "grad_lse", *grads.grad_lse, accumulation_dtype(in.k.dtype), std::nullopt);
    if (!in.variant.score.softmax) check.refuse("grad_lse", "None without softmax", describe(*grads.grad_lse));
}

namespace {

// A gradient whose tokens may lie apart, as they do in a slice of one tensor of three.
void check_token_gradient(const Checks& check, const char* argument, const TensorView& view, const char* name,
                          const TensorView& model) {
    check.like(argument, view, name, model);
    TensorView token = view;
    token.axes = view.axes - 1;
    std::copy_n(view.shape + 1, token.axes, token.shape);
    std::copy_n(view.strides + 1, token.axes, token.strides);
    if (view.shape[0] > 0) check.contiguous(argument, token);
}

}  // namespace

void check_gradients(const Checks& check, const AttentionInputs& in, const AttentionGradients& grads) {
    const DType dtype = in.k.dtype;
    check_like_output(check, in, "grad_out", grads.grad_out, dtype, value_axis(in));
    if (in.layout == QueryLayout::shared) {
        const int64_t* q = in.q.shape;
        check.tensor("grad_q", grads.grad_q, accumulation_dtype(dtype), {{"M", q[0]}, {"H", q[1]}, {"D", q[2]}});
        check.contiguous("grad_q", grads.grad_q);
    } else {
        check_token_gradient(check, "grad_q", grads.grad_q, "q", in.q);
    }
    check_token_gradient(check, "grad_k", grads.grad_k, "k", in.k);
    check_pair(check, "grad_v", in.v.has_value(), grads.grad_v);
    if (in.v) check_token_gradient(check, "grad_v", *grads.grad_v, "v", *in.v);
    check_variant_gradients(check, in, grads.variant);
    check_lse_gradient(check, in, grads);
    check_pair(check, "attn_out", in.gate.has_value(), grads.attn_out);
    check_pair(check, "grad_gate", in.gate.has_value(), grads.grad_gate);
    if (!in.gate) return;
    check_like_output(check, in, "attn_out", *grads.attn_out, accumulation_dtype(dtype), value_axis(in));
    check_gate_gradient(check, in, *grads.grad_gate);
}

}  // namespace interformer
