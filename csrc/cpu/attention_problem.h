// One call of an op of the attention family, as the kernels see it: plain numbers and pointers, the same for all three
// layouts, so that one kernel serves jagged attention, cross attention and PMA pooling.
#pragma once

#include <cstdint>

#include "common/scalar_maps.h"
#include "cpu/row_tensor.h"

namespace interformer {

struct AttentionProblem {
    int64_t rows = 0, heads = 0, kv_heads = 0, head_size = 0, value_size = 0;
    const int64_t* query_begins = nullptr;  // of packed queries, with their numbers; null: `queries` in each row
    const int64_t* query_counts = nullptr;
    int64_t queries = 0;
    const int64_t* key_begins = nullptr;
    const int64_t* key_counts = nullptr;
    int64_t most_queries = 0, most_keys = 0;  // of any row

    RowTensor q, k, v, gate, residual;
    bool v_is_k = false;
    bool causal = false;
    int64_t window_left = -1, window_right = -1, num_prefix = 0;
    RotaryTables rope;
    Positions positions_q, positions_k;
    double scale = 1, post_scale = 1;
    Score score{true, Activation::identity};
    Gate gating{false, Activation::sigmoid};

    // Forward.
    RowTensor out, attn_out, lse;  // A and lse in the type of accumulation

    // Backward. `attn_out` is read there.
    RowTensor grad_out, grad_q, grad_k, grad_v;
    bool shared_queries = false;  // grad_q is a sum over rows, in double
    RowTensor grad_gate;          // in double where `gate_summed` (strides of 0 sum over an axis), else of the type of
    bool gate_summed = false;     // accumulation
    int64_t gate_channels = 0;    // 1, or value_size
    int64_t query_run = 0, gate_run = 0;  // numbers between the sums of two runs of rows; 0: no sums over rows
};

}  // namespace interformer
