#include "cuda/jagged_weighted_sum.h"

#include <algorithm>
#include <cstdint>

#include "cuda/elements.h"
#include "cuda/instructions.cuh"
#include "cuda/row_lanes.cuh"
#include "cuda/rows.cuh"

namespace interformer {
namespace cuda {

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kPart = 32;   // tokens of a lane that are added up before they are added to its sum
constexpr int kPairs = 16;  // pairs of token and head of a group of lanes, in the backward

template <typename T>
struct Problem {
    const T *weights, *v, *grad_out;
    T *out, *grad_weights, *grad_v;
    int64_t weights_token, v_token, v_head, grad_row, grad_head;
    int64_t chunks;  // parts of a head's channels, each of one warp
    int heads, channels, lanes;
};

// The sums of a row under a head: a warp has `lanes * NUMBERS` channels, and its groups of lanes take every so many
// tokens.
template <typename T, int NUMBERS>
__global__ void __launch_bounds__(kThreads)
    sum_rows(const __grid_constant__ Problem<T> p, const __grid_constant__ Offsets offsets) {
    const int64_t task = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
    const int64_t row = task / (p.chunks * p.heads), head = task / p.chunks % p.heads;
    if (row >= offsets.rows) return;  // the whole warp
    const Span span = offsets.span(row);
    const int lane = lane_index(), step = kWarp / p.lanes;
    const int channel = static_cast<int>(task % p.chunks) * p.lanes * NUMBERS + lane % p.lanes;
    const T* weights = p.weights + span.first * p.weights_token + head;
    const T* v = p.v + span.first * p.v_token + head * p.v_head;
    float sums[NUMBERS] = {};
    for (int begin = lane / p.lanes; begin < span.count; begin += kPart * step) {
        float part[NUMBERS] = {};
        const int end = min(span.count, begin + kPart * step);
        for (int t = begin; t < end; t += step) {
            const float weight = widen(weights[t * p.weights_token]);
            const T* from = v + t * p.v_token;
#pragma unroll
            for (int i = 0; i < NUMBERS; ++i)
                if (const int c = channel + i * p.lanes; c < p.channels) part[i] += weight * widen(from[c]);
        }
#pragma unroll
        for (int i = 0; i < NUMBERS; ++i) sums[i] += part[i];
    }
#pragma unroll
    for (int i = 0; i < NUMBERS; ++i) {
        const float sum = sum_of_groups(sums[i], p.lanes);
        const int c = channel + i * p.lanes;
        if (lane < p.lanes && c < p.channels) p.out[(row * p.heads + head) * p.channels + c] = narrow<T>(sum);
    }
}

// Gradients of (token, head) pairs of any rows, a pair for each group of lanes; tokens of no row get zeros.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    sum_gradients(const __grid_constant__ Problem<T> p, const __grid_constant__ Offsets offsets) {
    const int groups = kThreads / p.lanes, lane = lane_index() % p.lanes;
    const int64_t all = offsets.tokens * p.heads;
    const int64_t begin = int64_t{blockIdx.x} * groups * kPairs, end = min(begin + groups * kPairs, all);
    // All rows of the block lie between those of its first and last token, so later searches are short.
    const int64_t low = offsets.row_between(begin / p.heads, 0, offsets.rows);
    const int64_t high = offsets.row_between((end - 1) / p.heads, low, offsets.rows);
    for (int i = 0; i < kPairs; ++i) {
        const int64_t pair = begin + i * groups + threadIdx.x / p.lanes;
        const bool written = pair < end;
        const int64_t last = min(pair, end - 1), token = last / p.heads, head = last - token * p.heads;
        const int64_t row = offsets.row_between(token, low, high);
        const bool held = written && row < offsets.rows && token >= offsets.edge(row);
        float dot = 0.0f;
        const float weight = held ? widen(p.weights[token * p.weights_token + head]) : 0.0f;
        for (int c = lane; written && c < p.channels; c += p.lanes) {
            const float grad = held ? widen(p.grad_out[row * p.grad_row + head * p.grad_head + c]) : 0.0f;
            if (held) dot += grad * widen(p.v[token * p.v_token + head * p.v_head + c]);
            p.grad_v[pair * p.channels + c] = narrow<T>(weight * grad);
        }
        dot = sum_in_group(dot, p.lanes);
        if (written && lane == 0) p.grad_weights[pair] = narrow<T>(dot);
    }
}

template <typename T>
Problem<T> problem_of(const WeightedSumInputs& in) {
    Problem<T> p{};
    p.weights = static_cast<const T*>(in.weights.data);
    p.v = static_cast<const T*>(in.v.data);
    p.weights_token = in.weights.strides[0];
    p.v_token = in.v.strides[0];
    p.v_head = in.v.strides[1];
    p.heads = static_cast<int>(in.v.shape[1]);
    p.channels = static_cast<int>(in.v.shape[2]);
    p.lanes = lanes_for(p.channels);
    return p;
}

template <typename T, int NUMBERS>
void start_sums(Problem<T> p, const Offsets& offsets, const Stream& stream) {
    const int64_t wide = p.lanes * NUMBERS;
    p.chunks = (p.channels + wide - 1) / wide;
    const int64_t warps = offsets.rows * p.heads * p.chunks;
    stream.launch(sum_rows<T, NUMBERS>, (warps + kWarps - 1) / kWarps, kThreads, 0, p, offsets);
}

}  // namespace

void jagged_weighted_sum_forward(const WeightedSumInputs& in, const WeightedSumOutputs& outputs, const Stream& stream) {
    check_forward(stream.checks(), in, outputs);
    if (outputs.out.size() == 0) return;
    with_element(in.v.dtype, [&](auto element) {
        using T = decltype(element);
        Problem<T> p = problem_of<T>(in);
        p.out = static_cast<T*>(outputs.out.data);
        const Offsets offsets(in.offsets, in.v.shape[0]);
        if (p.channels <= kWarp)
            start_sums<T, 1>(p, offsets, stream);
        else if (p.channels <= 2 * kWarp)
            start_sums<T, 2>(p, offsets, stream);
        else
            start_sums<T, 4>(p, offsets, stream);
    });
}

void jagged_weighted_sum_backward(const WeightedSumInputs& in, const WeightedSumGradients& grads,
                                  const Stream& stream) {
    check_backward(stream.checks(), in, grads);
    if (in.weights.size() == 0) return;
    with_element(in.v.dtype, [&](auto element) {
        using T = decltype(element);
        Problem<T> p = problem_of<T>(in);
        p.grad_out = static_cast<const T*>(grads.grad_out.data);
        p.grad_row = grads.grad_out.strides[0];
        p.grad_head = grads.grad_out.strides[1];
        p.grad_weights = static_cast<T*>(grads.grad_weights.data);
        p.grad_v = static_cast<T*>(grads.grad_v.data);
        const Offsets offsets(in.offsets, in.v.shape[0]);
        const int64_t pairs = offsets.tokens * p.heads, of_block = int64_t{kThreads} / p.lanes * kPairs;
        stream.launch(sum_gradients<T>, (pairs + of_block - 1) / of_block, kThreads, 0, p, offsets);
    });
}

}  // namespace cuda
}  // namespace interformer
