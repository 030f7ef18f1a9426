#include "cuda/jagged_softmax.h"

#include <algorithm>
#include <cmath>
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
constexpr int64_t kTail = 2048;  // numbers of a block that writes zeros
constexpr float kLog2E = 1.4426950408889634f;

template <typename T>
struct Problem {
    const T *scores, *grad_out;
    T* out;  // the weights or, backwards, the gradient of the scores
    int64_t scores_token, grad_token, head_blocks, tail_blocks;
    int heads, lanes;  // all heads, and those of a warp
};

// Writes the zeros of a block of the tail.
template <typename T>
__device__ void write_tail(const Problem<T>& p, const Offsets& offsets) {
    const int64_t begin = max(int64_t{blockIdx.x} * kTail, offsets.row(offsets.rows).first * p.heads);
    const int64_t end = min((int64_t{blockIdx.x} + 1) * kTail, offsets.tokens * p.heads);
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) p.out[i] = narrow<T>(0.0f);
}

// A warp has one row under some heads, and reads its scores three times: for the largest, for the sums, for the output.
template <typename T, bool BACKWARDS>
__global__ void __launch_bounds__(kThreads)
    softmax_rows(const __grid_constant__ Problem<T> p, const __grid_constant__ Offsets offsets) {
    if (blockIdx.x < p.tail_blocks) return write_tail(p, offsets);
    const int64_t task = (int64_t{blockIdx.x} - p.tail_blocks) * kWarps + threadIdx.x / kWarp;
    const int64_t row = task / p.head_blocks;
    if (row >= offsets.rows) return;  // the whole warp
    const Span span = offsets.row(row);
    const int lane = lane_index(), step = kWarp / p.lanes, first = lane / p.lanes;
    const int head = static_cast<int>(task % p.head_blocks) * p.lanes + lane % p.lanes;
    const int count = head < p.heads ? span.count : 0;  // tokens that this lane's group looks at
    const T* scores = p.scores + span.first * p.scores_token + head;
    const T* grad = p.grad_out + (BACKWARDS ? span.first * p.grad_token + head : 0);
    T* out = p.out + span.first * p.heads + head;

    float largest = -INFINITY;  // NaN is passed over, and shows in the sum
    for (int t = first; t < count; t += step) largest = fmaxf(largest, widen(scores[t * p.scores_token]));
    largest = max_of_groups(largest, p.lanes);
    // Where all scores are -inf, their differences to 0 are, too, and no NaN.
    const float base = largest == -INFINITY ? 0.0f : largest;
    const auto exponential = [&](int t) { return exp2f((widen(scores[t * p.scores_token]) - base) * kLog2E); };

    float sum = 0.0f, products = 0.0f;
    for (int t = first; t < count; t += step) {
        const float e = exponential(t);
        sum += e;
        if constexpr (BACKWARDS) products += e * widen(grad[t * p.grad_token]);
    }
    sum = sum_of_groups(sum, p.lanes);
    const float factor = 1.0f / (sum == 0.0f ? 1.0f : sum);
    const float delta = BACKWARDS ? sum_of_groups(products, p.lanes) * factor : 0.0f;
    for (int t = first; t < count; t += step) {
        float x = exponential(t) * factor;
        if constexpr (BACKWARDS) x *= widen(grad[t * p.grad_token]) - delta;
        out[int64_t{t} * p.heads] = narrow<T>(x);
    }
}

template <typename T>
void start(const SoftmaxInputs& in, const TensorView* grad_out, const TensorView& out, const Stream& stream) {
    const TensorView& scores = in.scores;
    const Offsets offsets(in.offsets, scores.shape[0]);
    Problem<T> p{};
    p.scores = static_cast<const T*>(scores.data);
    p.scores_token = scores.strides[0];
    if (grad_out != nullptr) {
        p.grad_out = static_cast<const T*>(grad_out->data);
        p.grad_token = grad_out->strides[0];
    }
    p.out = static_cast<T*>(out.data);
    p.heads = static_cast<int>(scores.shape[1]);
    p.lanes = lanes_for(p.heads);
    p.head_blocks = (p.heads + p.lanes - 1) / p.lanes;
    p.tail_blocks = (scores.size() + kTail - 1) / kTail;
    const int64_t blocks = p.tail_blocks + (offsets.rows * p.head_blocks + kWarps - 1) / kWarps;
    stream.launch(grad_out == nullptr ? softmax_rows<T, false> : softmax_rows<T, true>, blocks, kThreads, 0, p,
                  offsets);
}

}  // namespace

void jagged_softmax_forward(const SoftmaxInputs& in, const SoftmaxOutputs& outputs, const Stream& stream) {
    check_forward(stream.checks(), in, outputs);
    if (in.scores.size() == 0) return;
    with_element(in.scores.dtype, [&](auto element) { start<decltype(element)>(in, nullptr, outputs.out, stream); });
}

void jagged_softmax_backward(const SoftmaxInputs& in, const SoftmaxGradients& grads, const Stream& stream) {
    check_backward(stream.checks(), in, grads);
    if (in.scores.size() == 0) return;
    with_element(in.scores.dtype,
                 [&](auto element) { start<decltype(element)>(in, &grads.grad_out, grads.grad_scores, stream); });
}

}  // namespace cuda
}  // namespace interformer
