// The kernels of one element type, compiled for one instruction set, and the problems that they are given.
#pragma once

#include <cstdint>

#include "common/scalar_maps.h"
#include "cpu/attention_problem.h"
#include "cpu/row_tensor.h"

namespace interformer {

// `personalized_ffn` of docs/ops.md: y_t = act(x_t W_b + bias_b) (+ residual_t). Tensors of tokens are [T, 1 head,
// channels].
struct FfnProblem {
    int64_t inputs = 0, outputs = 0;  // E, F
    const int64_t* begins = nullptr;
    const int64_t* counts = nullptr;
    RowTensor x, residual, out;
    RowTensor weight, bias;  // [B, E, F] as rows of "tokens" E, and [B, F] as rows of one token
    Activation activation = Activation::identity;

    // Backward.
    RowTensor grad_out, grad_x, grad_weight, grad_bias;
};

// `apply_rotary` of docs/ops.md, or, backwards, its inverse.
struct RotaryProblem {
    int64_t heads = 0, head_size = 0;
    const int64_t* begins = nullptr;
    const int64_t* counts = nullptr;
    RowTensor x, out;
    RotaryTables rope;
    Positions positions;
    bool backwards = false;
};

// A task of attention: rows of a run under some key/value heads. `run` says whose sums over rows it adds to. Of a heavy
// row a task may be one part of its queries; the backward then sums the gradients of the row's keys in `row_sums`.
struct AttentionTask {
    int64_t first_row, last_row, first_head, last_head, run;
    int64_t part = -1;  // all
    void* row_sums = nullptr;
    int64_t divided = -1;  // which of the rows that are divided
};

// A task of the other ops is a run of rows [first, last). Memory is given by the thread; `..._memory` says how many
// bytes.
struct Kernels {
    int64_t (*attention_forward_memory)(const AttentionProblem&);
    int64_t (*attention_backward_memory)(const AttentionProblem&);
    void (*attention_forward)(const AttentionProblem&, const AttentionTask&, void* memory);
    void (*attention_backward)(const AttentionProblem&, const AttentionTask&, void* memory);
    // Parts of a row, and the bytes that `row_sums` takes. After the backward of a part, and on its thread's memory,
    // the part is added to `row_sums`, once all earlier ones are; the last one writes the gradients.
    int64_t (*attention_parts)(const AttentionProblem&, int64_t row);
    int64_t (*attention_sums_bytes)(const AttentionProblem&, int64_t row);
    void (*attention_add_part)(const AttentionProblem&, const AttentionTask&, void* memory);
    int64_t (*ffn_memory)(const FfnProblem&);
    void (*ffn_forward)(const FfnProblem&, int64_t first, int64_t last, void* memory);
    void (*ffn_backward)(const FfnProblem&, int64_t first, int64_t last, void* memory);
    int64_t (*rotary_memory)(const RotaryProblem&);
    void (*rotary)(const RotaryProblem&, int64_t first, int64_t last, void* memory);
};

}  // namespace interformer
