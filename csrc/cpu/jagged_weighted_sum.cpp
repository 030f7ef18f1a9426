#include "cpu/jagged_weighted_sum.h"

#include "cpu/caches.h"
#include "cpu/huge_pages.h"
#include "cpu/isa.h"
#include "cpu/kernel_table.h"
#include "cpu/row_tasks.h"

namespace interformer {

namespace {

// Multiply-adds that a number of the values counts for: it is read for a single one.
constexpr int64_t kWorkOfNumber = 2;

RowTensor token_values(const TensorView& x, const int64_t* begins) {
    return {x.data, begins, 0, x.strides[0], x.strides[1], x.strides[2], true};
}

RowTensor row_sums(const TensorView& x) {
    return {x.data, nullptr, x.strides[0], 0, x.strides[1], x.strides[2], true};
}

WeightedSumProblem problem_of(const WeightedSumInputs& in, const Rows& rows) {
    WeightedSumProblem p;
    p.heads = in.v.shape[1];
    p.channels = in.v.shape[2];
    p.counts = rows.counts();
    p.weights = token_scores(in.weights, rows.begins());
    p.v = token_values(in.v, rows.begins());
    return p;
}

}  // namespace

void jagged_weighted_sum_forward(const WeightedSumInputs& in, const WeightedSumOutputs& outputs, int64_t threads) {
    check_forward(Checks("jagged_weighted_sum_forward"), in, outputs);
    const Rows rows(in.offsets, in.v.shape[0]);
    WeightedSumProblem p = problem_of(in, rows);
    p.out = row_sums(outputs.out);
    const Kernels& native = kernels(in.v.dtype);
    for_row_groups(
        rows, threads, kWorkOfNumber * p.heads * p.channels, native.weighted_sum_memory(p),
        [&](int64_t first, int64_t last, void* memory) { native.weighted_sum_forward(p, first, last, memory); });
}

void jagged_weighted_sum_backward(const WeightedSumInputs& in, const WeightedSumGradients& grads, int64_t threads) {
    check_backward(Checks("jagged_weighted_sum_backward"), in, grads);
    const Rows rows(in.offsets, in.v.shape[0]);
    WeightedSumProblem p = problem_of(in, rows);
    p.out = row_sums(grads.grad_out);
    p.grad_weights = token_scores(grads.grad_weights, rows.begins());
    p.grad_v = token_values(grads.grad_v, rows.begins());
    p.stream = exceed_caches(grads.grad_v.size() * grads.grad_v.raw_type.bits / 8);
    advise_huge_pages(grads.grad_v);
    zero_gaps(rows, grads.grad_weights);
    zero_gaps(rows, grads.grad_v);
    const Kernels& native = kernels(in.v.dtype);
    for_row_groups(
        rows, threads, 2 * kWorkOfNumber * p.heads * p.channels, native.weighted_sum_memory(p),
        [&](int64_t first, int64_t last, void* memory) { native.weighted_sum_backward(p, first, last, memory); });
}

}  // namespace interformer
