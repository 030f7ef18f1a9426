#include "cpu/personalized_ffn.h"

#include "common/checks.h"
#include "cpu/huge_pages.h"
#include "cpu/kernels.h"
#include "cpu/level.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace interformer {

namespace {

void check_inputs(const Checks& check, const FfnInputs& in) {
    check.floating("x", in.x);
    check.tensor("x", in.x, in.x.dtype, {{"T"}, {"E"}});
    check.index("offsets", in.offsets);
    if (in.offsets.shape[0] < 1) check.refuse("offsets", "[B+1] with at least one entry", describe(in.offsets));
    const int64_t rows = in.offsets.shape[0] - 1;
    check.tensor("weight", in.weight, in.x.dtype, {{"B", rows}, {"E", in.x.shape[1]}, {"F"}});
    if (in.bias) check.tensor("bias", *in.bias, in.x.dtype, {{"B", rows}, {"F", in.weight.shape[2]}});
}

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

void personalized_ffn_forward(const FfnInputs& in, const std::optional<TensorView>& residual, const TensorView& out,
                              int64_t threads) {
    const Checks check("personalized_ffn_forward");
    check_inputs(check, in);
    const int64_t tokens = in.x.shape[0], outputs = in.weight.shape[2];
    check.tensor("out", out, in.x.dtype, {{"T", tokens}, {"F", outputs}});
    check.contiguous("out", out);
    if (residual) check.tensor("residual", *residual, in.x.dtype, {{"T", tokens}, {"F", outputs}});
    Call call(in);
    FfnProblem& p = call.problem;
    p.out = call.tokens(out);
    want_huge_pages(out);
    if (residual) p.residual = call.tokens(*residual);
    zero_gaps(call.rows(), out);
    const Kernels& native = kernels(in.x.dtype);
    call.run(native.ffn_memory(p), threads,
             [&](int64_t first, int64_t last, void* memory) { native.ffn_forward(p, first, last, memory); });
}

void personalized_ffn_backward(const FfnInputs& in, const FfnGradients& grads, int64_t threads) {
    const Checks check("personalized_ffn_backward");
    check_inputs(check, in);
    check.tensor("grad_out", grads.grad_out, in.x.dtype, {{"T", in.x.shape[0]}, {"F", in.weight.shape[2]}});
    check.gradient("grad_x", grads.grad_x, "x", in.x);
    check.gradient("grad_weight", grads.grad_weight, "weight", in.weight);
    if (in.bias.has_value() != grads.grad_bias.has_value())
        check.refuse("grad_bias", in.bias ? "given" : "None", grads.grad_bias ? describe(*grads.grad_bias) : "None");
    if (in.bias) check.gradient("grad_bias", *grads.grad_bias, "bias", *in.bias);
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
