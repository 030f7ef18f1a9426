// One attention call as the kernels see it: plain numbers and pointers, the same for all three layouts, so that one
// kernel serves jagged attention, cross attention and PMA pooling.
#pragma once

#include <cstdint>

#include "common/attention_variant.h"
#include "cpu/row_tensor.h"

namespace interformer {

// Rows of so few queries under one key/value head are computed under all heads at once.
constexpr int64_t kFewQueries = 8;

// Weights are dropped where a random word is less than `below`, of the key's index in its row plus `skipped`.
struct Dropout {
    bool some = false, all = false;  // whether weights are dropped at random, or each of them
    uint32_t seed[2] = {};
    uint32_t below = 0;
    int64_t skipped = 0;
    double factor = 1;  // of the weights that are kept
};

// A table of additive bias, [H or 1, entries] in the accumulation type, and sums of its gradient, [row groups, H,
// entries]. `head` numbers lie between the tables of two heads, 0 where all have one.
struct BiasTable {
    const void* table = nullptr;
    int64_t head = 0, entries = 0;
    double* grads = nullptr;
};

// Edges between bins of times, as `TimeCells` (time_cells.h) divides them. `halves`: where halving serves, for each of
// its steps of 32, 16, ... 1 edges the last edge of the first half of each part, `kHalves` numbers a step; else null.
struct TimeEdges {
    static constexpr int64_t kHalved = 63, kHalves = 32, kHalvings = 6;

    const int64_t* edges = nullptr;
    const int32_t* first_bins = nullptr;
    int64_t bits = 0, steps = 0;
    const int32_t* halves = nullptr;
};

struct AttentionProblem {
    int64_t rows = 0, heads = 0, kv_heads = 0, head_size = 0, value_size = 0;
    const int64_t* query_begins = nullptr;  // packed queries: spans of the rows; null: each row has `queries`
    const int64_t* query_counts = nullptr;
    int64_t queries = 0;
    const int64_t* target_counts = nullptr;  // of each row, clamped; null: rows have no targets
    const int64_t* key_begins = nullptr;
    const int64_t* key_counts = nullptr;
    int64_t max_queries = 0, max_keys = 0;  // over all rows

    RowTensor q, k, v, gate, residual;
    bool v_is_k = false;
    AttentionVariant variant;
    bool adjusts_scores = false;  // products become scores in a step of their own, which the softmax does not scale
    double weight_scale = 1;      // the factor of weights in the forward: `post_scale`, and that of dropout
    const void* sinks = nullptr;  // [H], in the accumulation type; null: none
    Dropout dropout;
    BiasTable position_bias, time_bias;
    const int64_t *times_q = nullptr, *times_k = nullptr;
    TimeEdges time_edges;
    RotaryTables rope;
    Positions positions_q, positions_k;
    Gate gating{false, Activation::sigmoid};

    // Forward. `attn_out` and `lse` have the accumulation type.
    RowTensor out, attn_out, lse;

    // Backward, which reads `attn_out`. `grad_lse` has the accumulation type.
    RowTensor grad_out, grad_lse, grad_q, grad_k, grad_v;
    double* grad_sinks = nullptr;         // sums [row groups, H]
    bool shared_queries = false;          // grad_q is a sum over rows, in double
    RowTensor grad_gate;                  // double where `gate_summed`, else the accumulation type
    bool gate_summed = false;             // strides of 0 in `grad_gate` sum over an axis
    int64_t gate_channels = 0;            // 1 or value_size
    const int64_t* row_groups = nullptr;  // the group of each row
    bool stream_key_grads = false;        // grad_k and grad_v exceed the caches
    // Numbers between the sums of two row groups; 0: no sum over rows.
    int64_t grad_q_group_stride = 0, grad_gate_group_stride = 0;
};

}  // namespace interformer
