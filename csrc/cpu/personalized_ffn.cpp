#include "cpu/personalized_ffn.h"

#include "cpu/huge_pages.h"
#include "cpu/kernels.h"
#include "cpu/level.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace interformer {

namespace {

class Call {
  public:
    FfnProblem problem;

    explicit Call(const FfnInputs& in) : rows_(in.offsets, in.x.shape[0]) {
        FfnProblem& p = problem;
        p.inputs = in.weight.shape[1];
        p.outputs = in.weight.shape[2];
        p.begins = rows_.begins();
        p.counts = rows_.counts();
        p.x = tokens(in.x);
        p.weight = matrices(in.weight);
        if (in.bias) p.bias = vectors(*in.bias);
        p.activation = in.activation;
    }

    const Rows& rows() const { return rows_; }
    RowTensor tokens(const TensorView& x) const {
        return {x.data, rows_.begins(), 0, x.strides[0], 0, x.strides[1], true};
    }
    static RowTensor matrices(const TensorView& x) {
        return {x.data, nullptr, x.strides[0], x.strides[1], 0, x.strides[2], true};
    }
    static RowTensor vectors(const TensorView& x) { return {x.data, nullptr, x.strides[0], 0, 0, x.strides[1], true}; }

    template <typename Task>
    void run(int64_t bytes, int64_t threads, Task&& task) const {
        const int64_t size = problem.inputs * problem.outputs;
        // A row costs its products, and the reading of its matrix.
        const Runs runs(rows_.count(), kMostRuns, [&](int64_t row) { return double(1 + rows_.counts()[row]); });
        const int64_t useful = rows_.ordered() ? threads : 1;  // rows that overlap write the same tokens
        const int active =
            worthwhile_threads(useful, runs.count(), static_cast<int64_t>(runs.total() * static_cast<double>(size)));
        ThreadMemory memory(active, bytes);
        parallel_for(active, runs.count(), [&](int64_t i, int thread) {
            const int64_t run = runs.in_order(i);
            task(runs.cut(run), runs.cut(run + 1), memory.of(thread));
        });
    }

  private:
    Rows rows_;
};

}  // namespace

void personalized_ffn_forward(const FfnInputs& in, const FfnOutputs& to, int64_t threads) {
    check_forward(Checks("personalized_ffn_forward"), in, to);
    Call call(in);
    FfnProblem& p = call.problem;
    p.out = call.tokens(to.out);
    want_huge_pages(to.out);
    if (to.residual) p.residual = call.tokens(*to.residual);
    zero_gaps(call.rows(), to.out);
    const Kernels& native = kernels(in.x.dtype);
    call.run(native.ffn_memory(p), threads,
             [&](int64_t first, int64_t last, void* memory) { native.ffn_forward(p, first, last, memory); });
}

void personalized_ffn_backward(const FfnInputs& in, const FfnGradients& grads, int64_t threads) {
    check_backward(Checks("personalized_ffn_backward"), in, grads);
    Call call(in);
    FfnProblem& p = call.problem;
    p.grad_out = call.tokens(grads.grad_out);
    p.grad_x = call.tokens(grads.grad_x);
    want_huge_pages(grads.grad_x);
    want_huge_pages(grads.grad_weight);
    p.grad_weight = call.matrices(grads.grad_weight);
    if (in.bias) p.grad_bias = call.vectors(*grads.grad_bias);
    zero_gaps(call.rows(), grads.grad_x);
    const Kernels& native = kernels(in.x.dtype);
    call.run(native.ffn_memory(p), threads,
             [&](int64_t first, int64_t last, void* memory) { native.ffn_backward(p, first, last, memory); });
}

}  // namespace interformer
