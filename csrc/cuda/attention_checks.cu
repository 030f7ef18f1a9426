// What the attention kernels want of their arguments, beyond what every backend does.
#include <stdexcept>
#include <string>

#include "cuda/attention.h"
#include "cuda/queue.cuh"

namespace interformer {
namespace cuda {

namespace {

int64_t query_tokens(const AttentionInputs& in) {
    const int64_t* q = in.q.shape;
    return in.layout == QueryLayout::packed ? q[0] : (in.kv_offsets.shape[0] - 1) * q[in.q.axes - 3];
}

void check_call(const Checks& check, const AttentionInputs& in) {
    check_inputs(check, in);
    check.contiguous_last_axis("q", in.q);
    if (in.cos) check.refuse("cos", "None: rotary embedding is a pass of its own", describe(*in.cos));
    for (const TensorView* x : {&in.k, in.v ? &*in.v : &in.k})
        if (x->shape[2] > kMostChannels)
            throw std::runtime_error("the CUDA kernels of attention serve heads of at most " +
                                     std::to_string(kMostChannels) + " channels, found " + describe(*x));
}

// A number for each query, of float32.
void check_per_query(const Checks& check, const AttentionInputs& in, const char* argument, bool wanted,
                     const std::optional<TensorView>& x) {
    check_pair(check, argument, wanted, x);
    if (!x) return;
    check_like_output(check, in, argument, *x, DType::float32, std::nullopt);
    check.contiguous(argument, *x);
}

// Sums have `channels`; which of the two are there follows from the direction.
void check_pieces(const Checks& check, const AttentionInputs& in, const AttentionPieces& pieces, Axis channels,
                  bool has_sums, bool has_weights) {
    check_pair(check, "pieces", has_sums && pieces.split != 0, pieces.sums);
    check_pair(check, "weights", has_weights && pieces.split != 0, pieces.weights);
    if (pieces.split == 0) return;
    if (pieces.split < 0 || pieces.split % 32 != 0 || in.layout == QueryLayout::packed)
        check.refuse("split", "a multiple of 32, and 0 for packed queries", std::to_string(pieces.split));
    const Axis room{"P", 2 * in.k.shape[0] / pieces.split + 1}, n{"N", in.q.shape[in.q.axes - 3]},
        heads{"H", in.q.shape[in.q.axes - 2]};
    if (pieces.sums) {
        check.tensor("pieces", *pieces.sums, DType::float32, {room, n, heads, channels});
        check.contiguous("pieces", *pieces.sums);
    }
    if (pieces.weights) {
        check.tensor("weights", *pieces.weights, DType::float32, {room, n, heads, {"2", 2}});
        check.contiguous("weights", *pieces.weights);
    }
}

void check_queue(const Checks& check, const TensorView& queue) {
    check.tensor("queue", queue, DType::int64, {{"Q", kQueueSize}});
    check.contiguous("queue", queue);
}

void check_gate_gradient(const Checks& check, const AttentionInputs& in, const TensorView& grad, int64_t block) {
    check.contiguous("grad_gate", grad);
    const Axis last{"Dv or 1", grad.axes > 0 && grad.shape[grad.axes - 1] == 1 ? 1 : value_axis(in).size};
    if (block == 1) {
        const bool whole =
            grad.dtype == in.k.dtype && grad.axes > 0 && grad.shape[grad.axes - 1] == value_axis(in).size;
        return check_like_output(check, in, "grad_gate", grad, whole ? in.k.dtype : DType::float32, last);
    }
    if (block < 1) check.refuse("gate_block", "at least 1", std::to_string(block));
    const Axis blocks{"blocks", (query_tokens(in) + block - 1) / block}, heads{"H", in.q.shape[in.q.axes - 2]};
    if (in.layout == QueryLayout::packed)
        check.tensor("grad_gate", grad, DType::float32, {blocks, heads, last});
    else
        check.tensor("grad_gate", grad, DType::float32, {blocks, {"1", 1}, heads, last});
}

}  // namespace

void check_forward(const Checks& check, const AttentionInputs& in, const AttentionOutputs& to,
                   const AttentionPieces& pieces, const TensorView& queue) {
    check_call(check, in);
    check_queue(check, queue);
    check_outputs(check, in, to);
    if (to.residual) check.contiguous_last_axis("residual", *to.residual);
    check_pieces(check, in, pieces, value_axis(in), true, true);
}

void check_backward(const Checks& check, const AttentionInputs& in, const AttentionGradients& grads,
                    const AttentionSides& sides, int64_t gate_block, const AttentionPieces& pieces, int64_t parts,
                    const TensorView& queue) {
    check_call(check, in);
    check_queue(check, queue);
    const DType dtype = in.k.dtype;
    const bool is_shared = in.layout == QueryLayout::shared;
    const bool softmax = in.score.softmax, gated = in.gate.has_value();
    check_like_output(check, in, "grad_out", grads.grad_out, dtype, value_axis(in));
    check.contiguous_last_axis("grad_out", grads.grad_out);
    if (parts < 1 || (parts > 1 && !is_shared))
        check.refuse("parts", "1, or more for shared queries", std::to_string(parts));
    check_pieces(check, in, pieces, {"D", in.k.shape[2]}, !is_shared, softmax);
    if (is_shared) {
        const int64_t* q = in.q.shape;
        if (grads.grad_q.shape[0] % parts != 0)
            check.refuse("grad_q", "of runs times " + std::to_string(parts) + " parts", describe(grads.grad_q));
        check.tensor("grad_q", grads.grad_q, DType::float32, {{"runs * parts"}, {"M", q[0]}, {"H", q[1]}, {"D", q[2]}});
        check.contiguous("grad_q", grads.grad_q);
    } else {
        check.gradient("grad_q", grads.grad_q, "q", in.q);
    }
    check_key_gradients(check, in, grads);
    check_pair(check, "attn_out", gated, grads.attn_out);
    check_per_query(check, in, "lse", softmax, sides.lse);
    check_per_query(check, in, "delta", softmax, sides.delta);
    check_per_query(check, in, "share", softmax, sides.share);
    const bool scaled = !softmax && in.post_scale != 1.0;
    check_pair(check, "grad_attn_out", gated || scaled, sides.grad_attn_out);
    if (sides.grad_attn_out) {
        check_like_output(check, in, "grad_attn_out", *sides.grad_attn_out, dtype, value_axis(in));
        check.contiguous("grad_attn_out", *sides.grad_attn_out);
    }
    check_pair(check, "grad_gate", gated, grads.grad_gate);
    if (!gated) return;
    check_like_output(check, in, "attn_out", *grads.attn_out, DType::float32, value_axis(in));
    check.contiguous("attn_out", *grads.attn_out);
    check_gate_gradient(check, in, *grads.grad_gate, gate_block);
}

}  // namespace cuda
}  // namespace interformer
