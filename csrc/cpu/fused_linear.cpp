#include "cpu/fused_linear.h"

#include <algorithm>

#include "cpu/caches.h"
#include "cpu/huge_pages.h"
#include "cpu/isa.h"
#include "cpu/kernel_table.h"
#include "cpu/parallel.h"

namespace interformer {

namespace {

// Tokens of a task of the forward and, at least, of one of the backward, each of which sums gradients of weights on its
// own; and how many such sums there are at most. All follow from the number of tokens alone, as the bits do.
constexpr int64_t kForwardTokens = 96, kBackwardTokens = 2048, kMostSums = 64;

// [first, last) of equal shares of `tokens`.
struct Shares {
    int64_t tokens, count;

    Shares(int64_t tokens, int64_t size, int64_t most)
        : tokens(tokens), count(std::min(most, std::max<int64_t>(1, (tokens + size - 1) / size))) {}
    int64_t bound(int64_t share) const { return tokens / count * share + std::min(share, tokens % count); }
};

RowTensor rows(const TensorView& x) {
    return {x.data, nullptr, 0, x.strides[0], 0, x.strides[1], true};
}
RowTensor vector(const TensorView& x) {
    return {x.data, nullptr, 0, 0, 0, x.strides[0], true};
}
RowTensor rows(const std::optional<TensorView>& x) {
    return x ? rows(*x) : RowTensor{};
}
RowTensor vector(const std::optional<TensorView>& x) {
    return x ? vector(*x) : RowTensor{};
}

LinearProblem problem_of(const LinearInputs& in) {
    LinearProblem p;
    p.inputs = in.x.shape[1];
    p.outputs = in.weight.shape[0];
    p.x = rows(in.x);
    p.weight = rows(in.weight);
    p.bias = vector(in.bias);
    p.norm_weight = vector(in.norm_weight);
    p.norm_bias = vector(in.norm_bias);
    p.gate = rows(in.gate);
    p.eps = in.eps;
    p.activation = in.activation;
    return p;
}

int64_t bytes_of(const TensorView& x) {
    return x.size() * x.raw_type.bits / 8;
}

// The operands that all tasks of a call read.
ThreadMemory pack(LinearProblem& p, const Kernels& native, bool backward) {
    ThreadMemory memory(1, native.linear_packed_bytes(p, backward));
    native.linear_pack(p, backward, memory.for_thread(0));
    p.packed = memory.for_thread(0);
    return memory;
}

}  // namespace

void fused_linear_forward(const LinearInputs& in, const LinearOutputs& outputs, int64_t threads) {
    check_forward(Checks("fused_linear_forward"), in, outputs);
    LinearProblem p = problem_of(in);
    p.out = rows(outputs.out);
    p.residual = rows(outputs.residual);
    p.stream = exceed_caches(bytes_of(outputs.out));
    advise_huge_pages(outputs.out);
    const Kernels& native = kernels(in.x.dtype);
    const ThreadMemory packed = pack(p, native, false);
    const Shares tasks(in.x.shape[0], kForwardTokens, in.x.shape[0]);
    const int active = worthwhile_threads(threads, tasks.count, in.x.size() * p.outputs);
    ThreadMemory memory(active, native.linear_memory(p, false));
    parallel_for(active, tasks.count, [&](int64_t task, int thread) {
        native.linear_forward(p, tasks.bound(task), tasks.bound(task + 1), memory.for_thread(thread));
    });
}

void fused_linear_backward(const LinearInputs& in, const LinearGradients& grads, int64_t threads) {
    check_backward(Checks("fused_linear_backward"), in, grads);
    LinearProblem p = problem_of(in);
    p.grad_out = rows(grads.grad_out);
    p.grad_x = rows(grads.grad_x);
    p.grad_weight = rows(grads.grad_weight);
    p.grad_bias = vector(grads.grad_bias);
    p.grad_norm_weight = vector(grads.grad_norm_weight);
    p.grad_norm_bias = vector(grads.grad_norm_bias);
    p.grad_gate = rows(grads.grad_gate);
    p.stream = exceed_caches(bytes_of(grads.grad_x) * (in.gate ? 2 : 1));
    advise_huge_pages(grads.grad_x);
    if (grads.grad_gate) advise_huge_pages(*grads.grad_gate);
    const Kernels& native = kernels(in.x.dtype);
    const ThreadMemory packed = pack(p, native, true);
    const Shares tasks(in.x.shape[0], kBackwardTokens, kMostSums);
    const int active = worthwhile_threads(threads, tasks.count, 2 * in.x.size() * p.outputs);
    ThreadMemory memory(active, native.linear_memory(p, true));
    const int64_t bytes = native.linear_sums_bytes(p);
    ThreadMemory sums(1, bytes * tasks.count);
    char* const first = static_cast<char*>(sums.for_thread(0));
    parallel_for(active, tasks.count, [&](int64_t task, int thread) {
        native.linear_backward(p, tasks.bound(task), tasks.bound(task + 1), memory.for_thread(thread),
                               first + task * bytes);
    });
    const Shares outputs(p.outputs, 16, std::max<int64_t>(p.outputs, 1));
    const int adding = worthwhile_threads(threads, outputs.count, p.outputs * p.inputs * tasks.count);
    parallel_for(adding, outputs.count, [&](int64_t share, int) {
        native.linear_add_sums(p, first, tasks.count, outputs.bound(share), outputs.bound(share + 1));
    });
}

}  // namespace interformer
