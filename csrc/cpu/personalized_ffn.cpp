#include "cpu/personalized_ffn.h"

#include <utility>

#include "cpu/caches.h"
#include "cpu/huge_pages.h"
#include "cpu/isa.h"
#include "cpu/kernel_table.h"
#include "cpu/row_tasks.h"

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
        for_row_groups(rows_, threads, problem.inputs * problem.outputs, bytes, std::forward<Task>(task));
    }

  private:
    Rows rows_;
};

int64_t bytes_of(const TensorView& x) {
    return x.size() * x.raw_type.bits / 8;
}

}  // namespace

void personalized_ffn_forward(const FfnInputs& in, const FfnOutputs& outputs, int64_t threads) {
    check_forward(Checks("personalized_ffn_forward"), in, outputs);
    Call call(in);
    FfnProblem& p = call.problem;
    p.out = call.tokens(outputs.out);
    p.stream = exceed_caches(bytes_of(outputs.out));
    advise_huge_pages(outputs.out);
    if (outputs.residual) p.residual = call.tokens(*outputs.residual);
    zero_gaps(call.rows(), outputs.out);
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
    advise_huge_pages(grads.grad_x);
    advise_huge_pages(grads.grad_weight);
    p.grad_weight = call.matrices(grads.grad_weight);
    p.stream = exceed_caches(bytes_of(grads.grad_x) + bytes_of(grads.grad_weight));
    if (in.bias) p.grad_bias = call.vectors(*grads.grad_bias);
    zero_gaps(call.rows(), grads.grad_x);
    const Kernels& native = kernels(in.x.dtype);
    call.run(native.ffn_memory(p), threads,
             [&](int64_t first, int64_t last, void* memory) { native.ffn_backward(p, first, last, memory); });
}

}  // namespace interformer
