// PMA pooling on the CPU: every row's keys are attended by seeds [M, H, D] that all rows share.
//
//     A[b, m, h] = sum over t in row b, from skip_prefix on, of w(scale * <seeds[m, h], k[t, h / (H / Hk)]>) * v[t,
//     ...] out = residual + G(A, gate)
#pragma once

#include <cstdint>
#include <optional>

#include "common/tensor_view.h"
#include "cpu/activation.h"

namespace interformer {

// What forward and backward both read. Floating tensors share one dtype; k and v are contiguous along their last axis.
struct PmaPoolingInputs {
    TensorView seeds;                // [M, H, D]
    TensorView k;                    // [T, Hk, D]
    std::optional<TensorView> v;     // [T, Hk, Dv]; none: v is k
    TensorView offsets;              // [B + 1]
    std::optional<TensorView> gate;  // [B, M, H, Dv], expanded
    double scale;
    int64_t skip_prefix;
    Score score;
    double post_scale;
    Gate gating;
};

struct PmaPoolingOutputs {
    std::optional<TensorView> residual;  // [B, M, H, Dv], read
    TensorView out;                      // [B, M, H, Dv]
    std::optional<TensorView> lse;       // [B, M, H] in the type of accumulation, softmax only
    std::optional<TensorView> attended;  // [B, M, H, Dv]: A itself
};

// The same bits for any number of threads, and for a row whatever the other rows are.
void pma_pooling_forward(const PmaPoolingInputs& in, const PmaPoolingOutputs& out, int64_t threads);

struct PmaPoolingGradients {
    TensorView grad_out;                  // [B, M, H, Dv], read
    std::optional<TensorView> attended;   // [B, M, H, Dv]: A itself, read; only a gate needs it
    TensorView grad_seeds;                // [M, H, D]
    TensorView grad_k;                    // [T, Hk, D]; with v's share where v is k
    std::optional<TensorView> grad_v;     // [T, Hk, Dv]
    std::optional<TensorView> grad_gate;  // [B | 1, M | 1, H | 1, Dv | 1]: summed over the axes of size 1
};

// The same bits for any number of threads: sums over rows are taken over runs of rows that the offsets fix, in order.
void pma_pooling_backward(const PmaPoolingInputs& in, const PmaPoolingGradients& grads, int64_t threads);

}  // namespace interformer
