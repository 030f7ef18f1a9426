#include "cpu/jagged_softmax.h"

#include "cpu/huge_pages.h"
#include "cpu/isa.h"
#include "cpu/kernel_table.h"
#include "cpu/row_tasks.h"

namespace interformer {

namespace {

constexpr int64_t kWork = 16;  // multiply-adds that take as long as a score

SoftmaxProblem problem_of(const SoftmaxInputs& in, const Rows& rows) {
    SoftmaxProblem p;
    p.heads = in.scores.shape[1];
    p.counts = rows.counts();
    p.scores = token_scores(in.scores, rows.begins());
    return p;
}

}  // namespace

void jagged_softmax_forward(const SoftmaxInputs& in, const SoftmaxOutputs& outputs, int64_t threads) {
    check_forward(Checks("jagged_softmax_forward"), in, outputs);
    const Rows rows(in.offsets, in.scores.shape[0]);
    SoftmaxProblem p = problem_of(in, rows);
    p.out = token_scores(outputs.out, rows.begins());
    advise_huge_pages(outputs.out);
    zero_gaps(rows, outputs.out);
    const Kernels& native = kernels(in.scores.dtype);
    for_row_groups(rows, threads, kWork * p.heads, native.softmax_memory(p),
                   [&](int64_t first, int64_t last, void* memory) { native.softmax_forward(p, first, last, memory); });
}

void jagged_softmax_backward(const SoftmaxInputs& in, const SoftmaxGradients& grads, int64_t threads) {
    check_backward(Checks("jagged_softmax_backward"), in, grads);
    const Rows rows(in.offsets, in.scores.shape[0]);
    SoftmaxProblem p = problem_of(in, rows);
    p.grad_out = token_scores(grads.grad_out, rows.begins());
    p.out = token_scores(grads.grad_scores, rows.begins());
    advise_huge_pages(grads.grad_scores);
    zero_gaps(rows, grads.grad_scores);
    const Kernels& native = kernels(in.scores.dtype);
    for_row_groups(rows, threads, kWork * p.heads, native.softmax_memory(p),
                   [&](int64_t first, int64_t last, void* memory) { native.softmax_backward(p, first, last, memory); });
}

}  // namespace interformer
