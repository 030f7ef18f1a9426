// Backward of the attention family: first through the gate, then the passes for delta, dQ, and dK with dV.
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
constexpr int kBlocks = 8;  // blocks of a multiprocessor, at least

template <typename T>
struct EpilogueArguments {
    AttentionProblem<T> problem;
    Heads<const T> grad_out{}, gate{};  // `gate` null: none
    Gate gating{};
    const float* attn_out = nullptr;
    T* grad_attn_out = nullptr;
    // The gate's gradient; or, where the gate broadcasts, sums of it over blocks of tokens, over channels, or both.
    T* grad_gate = nullptr;
    float* gate_sums = nullptr;
    bool over_channels = false;
    int gate_block = 1;  // tokens that are summed over; 1: none
    int64_t tokens = 0;  // queries of all rows
};

// Gradients of A and of the gate at one number.
struct GateGradients {
    float attn_out, gate;
};

template <typename T>
__device__ GateGradients gate_backward(const EpilogueArguments<T>& e, float grad_out, float a, float g) {
    const Activation kind = e.gating.activation;
    if (e.gating.inside) {
        const float d_product = grad_out * activation_grad(a * g, kind);
        return {d_product * g, d_product * a};
    }
    return {grad_out * activate(g, kind), grad_out * a * activation_grad(g, kind)};
}

// A block of query tokens under one head for each warp: gradients of A, times `inner_scale`, and of the gate. All are
// zero on the tail.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    epilogue_gradients(const __grid_constant__ EpilogueArguments<T> e) {
    const AttentionProblem<T>& p = e.problem;
    const int channels = p.value_channels, lane = lane_index();
    const int64_t item = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
    const int64_t block = item / p.heads, head = item % p.heads, first = block * e.gate_block;
    const bool packed = p.layout == QueryLayout::packed, over_tokens = e.gate_block > 1;
    const int64_t tail = packed ? p.q_offsets.edge(p.q_offsets.rows) : e.tokens;
    SharedMemory shared;
    // Each lane reads and writes only its own channels of the warp's sums, so no barrier is needed.
    float* sums = shared.numbers<float>(kWarps * channels) + threadIdx.x / kWarp * channels;
    if (over_tokens)
        for (int c = lane; c < channels; c += kWarp) sums[c] = 0.0f;

    float block_sum = 0.0f;  // the gate's gradient over tokens and channels
    for (int64_t t = first; t < min(first + e.gate_block, e.tokens); ++t) {
        const int64_t row = packed ? 0 : t / p.queries, n = packed ? t : t % p.queries, place = t * p.heads + head;
        const T* grad_out = e.grad_out.at(row, n, head);
        const T* gate = e.gate.data == nullptr ? nullptr : e.gate.at(row, n, head);
        float token_sum = 0.0f;
#pragma unroll 1
        for (int c = lane; c < channels; c += kWarp) {
            const int64_t at = place * channels + c;
            GateGradients grads{t < tail ? widen(grad_out[c]) : 0.0f, 0.0f};
            if (t < tail && gate != nullptr)
                grads = gate_backward(e, grads.attn_out, e.attn_out[at], widen(gate[c * e.gate.channel]));
            e.grad_attn_out[at] = narrow<T>(grads.attn_out * p.variant.inner_scale);
            if (gate == nullptr) continue;
            if (e.over_channels)
                token_sum += grads.gate;
            else if (over_tokens)
                sums[c] += grads.gate;
            else if (e.gate_sums != nullptr)
                e.gate_sums[at] = grads.gate;
            else
                e.grad_gate[at] = narrow<T>(grads.gate);
        }
        token_sum = warp_sum(token_sum);
        block_sum += token_sum;
        if (lane == 0 && e.over_channels && !over_tokens) e.gate_sums[place] = token_sum;
    }
    if (!over_tokens || first >= e.tokens) return;
    if (e.over_channels) {
        if (lane == 0) e.gate_sums[item] = block_sum;
        return;
    }
    for (int c = lane; c < channels; c += kWarp) e.gate_sums[item * channels + c] = sums[c];
}

template <typename T>
EpilogueArguments<T> epilogue_arguments(const Backward& call) {
    EpilogueArguments<T> e{AttentionProblem<T>(call.in)};
    e.tokens = e.problem.query_tokens();
    e.grad_out = Heads<const T>(call.grads.grad_out);
    e.gate_block = static_cast<int>(call.workspace.gate_block);
    e.grad_attn_out = static_cast<T*>(call.workspace.grad_attn_out->data);
    if (!call.in.gate) return e;
    const TensorView& grad_gate = *call.grads.grad_gate;
    e.gating = call.in.gating;
    e.gate = Heads<const T>(*call.in.gate);
    e.attn_out = static_cast<const float*>(call.grads.attn_out->data);
    e.over_channels = grad_gate.shape[grad_gate.axes - 1] != e.problem.value_channels;
    if (grad_gate.dtype == DType::float32)
        e.gate_sums = static_cast<float*>(grad_gate.data);
    else
        e.grad_gate = static_cast<T*>(grad_gate.data);
    return e;
}

}  // namespace

void epilogue_backward(const Backward& call) {
    if (!call.workspace.grad_attn_out) return;
    with_element(call.in.k.dtype, [&](auto element) {
        using T = decltype(element);
        const EpilogueArguments<T> e = epilogue_arguments<T>(call);
        const int64_t items = (e.tokens + e.gate_block - 1) / e.gate_block * e.problem.heads;
        const int shared = kWarps * e.problem.value_channels * static_cast<int>(sizeof(float));
        call.stream.launch(epilogue_gradients<T>, (items + kWarps - 1) / kWarps, kThreads, shared, e);
    });
}

void attention_backward(const AttentionInputs& in, const AttentionGradients& grads, const BackwardWorkspace& workspace,
                        bool tf32, const Stream& stream) {
    check_backward(stream.checks(), in, grads, workspace);
    const TensorView& grad_attn_out = workspace.grad_attn_out ? *workspace.grad_attn_out : grads.grad_out;
    const Backward call{in, grads, workspace, grad_attn_out, tf32, stream};
    epilogue_backward(call);
    query_stats_backward(call);
    queries_backward(call);
    keys_backward(call);
    tables_backward(call);
}

}  // namespace cuda
}  // namespace interformer
