// Backward of the attention family: what flows back through a gate, and then the passes for delta, dQ, and dK with dV.
#include <cstdint>

#include "cuda/attention.h"
#include "cuda/attention_problem.cuh"
#include "cuda/maps.cuh"
#include "cuda/tiles.cuh"

namespace interformer {
namespace cuda {

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kBlocks = 8;  // of a multiprocessor, at least

template <typename T>
struct Backflow {
    AttentionProblem<T> problem;
    Heads<const T> grad_out{}, gate{};  // no gate: null
    Gate gating{};
    const float* attn_out = nullptr;
    T* grad_attn_out = nullptr;
    // Of the gate: its gradient, or, where it broadcasts, sums over blocks of tokens, over channels, or over neither.
    T* grad_gate = nullptr;
    float* gate_sums = nullptr;
    bool over_channels = false;
    int block = 1;       // tokens that are summed over; 1: none
    int64_t tokens = 0;  // queries of all rows
};

// Gradients of A and of the gate at one number.
struct Flow {
    float attn_out, gate;
};

template <typename T>
__device__ Flow flow_back(const Backflow<T>& f, float grad, float a, float g) {
    const Activation kind = f.gating.activation;
    if (f.gating.inside) {
        const float inner = grad * slope(a * g, kind);
        return {inner * g, inner * a};
    }
    return {grad * activate(g, kind), grad * a * slope(g, kind)};
}

// Some query tokens under one head, by a warp: gradients of A, times `inner_scale`, and of the gate. On the tail all
// are zero.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks) epilogue_gradients(const __grid_constant__ Backflow<T> f) {
    const AttentionProblem<T>& p = f.problem;
    const int channels = p.value_channels, lane = lane_index();
    const int64_t item = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
    const int64_t block = item / p.heads, head = item % p.heads, first = block * f.block;
    const bool packed = p.layout == QueryLayout::packed, over_tokens = f.block > 1;
    const int64_t held = packed ? p.q_offsets.edge(p.q_offsets.rows) : f.tokens;
    SharedMemory shared;
    // Each lane has its own channels of the warp's line: nobody else reads or writes them.
    float* line = shared.numbers<float>(kWarps * channels) + threadIdx.x / kWarp * channels;
    if (over_tokens)
        for (int c = lane; c < channels; c += kWarp) line[c] = 0.0f;

    float total = 0.0f;  // of the gate's gradient, over tokens and channels
    for (int64_t t = first; t < min(first + f.block, f.tokens); ++t) {
        const int64_t row = packed ? 0 : t / p.queries, n = packed ? t : t % p.queries, place = t * p.heads + head;
        const T* grad_out = f.grad_out.at(row, n, head);
        const T* gate = f.gate.data == nullptr ? nullptr : f.gate.at(row, n, head);
        float across = 0.0f;
#pragma unroll 1
        for (int c = lane; c < channels; c += kWarp) {
            const int64_t at = place * channels + c;
            Flow flow{t < held ? widen(grad_out[c]) : 0.0f, 0.0f};
            if (t < held && gate != nullptr)
                flow = flow_back(f, flow.attn_out, f.attn_out[at], widen(gate[c * f.gate.channel]));
            f.grad_attn_out[at] = narrow<T>(flow.attn_out * p.inner_scale);
            if (gate == nullptr) continue;
            if (f.over_channels)
                across += flow.gate;
            else if (over_tokens)
                line[c] += flow.gate;
            else if (f.gate_sums != nullptr)
                f.gate_sums[at] = flow.gate;
            else
                f.grad_gate[at] = narrow<T>(flow.gate);
        }
        across = warp_sum(across);
        total += across;
        if (lane == 0 && f.over_channels && !over_tokens) f.gate_sums[place] = across;
    }
    if (!over_tokens || first >= f.tokens) return;
    if (f.over_channels) {
        if (lane == 0) f.gate_sums[item] = total;
        return;
    }
    for (int c = lane; c < channels; c += kWarp) f.gate_sums[item * channels + c] = line[c];
}

template <typename T>
Backflow<T> backflow_of(const AttentionInputs& in, const AttentionGradients& grads, const AttentionSides& sides,
                        int64_t gate_block) {
    Backflow<T> f{AttentionProblem<T>(in)};
    f.tokens = f.problem.query_tokens();
    f.grad_out = Heads<const T>(grads.grad_out);
    f.block = static_cast<int>(gate_block);
    f.grad_attn_out = static_cast<T*>(sides.grad_attn_out->data);
    if (!in.gate) return f;
    const TensorView& grad_gate = *grads.grad_gate;
    f.gating = in.gating;
    f.gate = Heads<const T>(*in.gate);
    f.attn_out = static_cast<const float*>(grads.attn_out->data);
    f.over_channels = grad_gate.shape[grad_gate.axes - 1] != f.problem.value_channels;
    if (grad_gate.dtype == DType::float32)
        f.gate_sums = static_cast<float*>(grad_gate.data);
    else
        f.grad_gate = static_cast<T*>(grad_gate.data);
    return f;
}

}  // namespace

void epilogue_backward(const AttentionInputs& in, const AttentionGradients& grads, const AttentionSides& sides,
                       int64_t gate_block, const Stream& stream) {
    if (!sides.grad_attn_out) return;
    with_element(in.k.dtype, [&](auto element) {
        using T = decltype(element);
        const Backflow<T> f = backflow_of<T>(in, grads, sides, gate_block);
        const int64_t items = (f.tokens + f.block - 1) / f.block * f.problem.heads;
        const int shared = kWarps * f.problem.value_channels * static_cast<int>(sizeof(float));
        stream.launch(epilogue_gradients<T>, (items + kWarps - 1) / kWarps, kThreads, shared, f);
    });
}

void attention_backward(const AttentionInputs& in, const AttentionGradients& grads, const AttentionSides& sides,
                        int64_t gate_block, const AttentionPieces& pieces, int64_t parts, const TensorView& queue,
                        bool tf32, const Stream& stream) {
    check_backward(stream.checks(), in, grads, sides, gate_block, pieces, parts, queue);
    epilogue_backward(in, grads, sides, gate_block, stream);
    const TensorView& grad_attn_out = sides.grad_attn_out ? *sides.grad_attn_out : grads.grad_out;
    shares_backward(in, grad_attn_out, sides, pieces, queue, tf32, stream);
    queries_backward(in, grad_attn_out, grads, sides, pieces, parts, queue, tf32, stream);
    keys_backward(in, grad_attn_out, grads, sides, queue, tf32, stream);
}

}  // namespace cuda
}  // namespace interformer
