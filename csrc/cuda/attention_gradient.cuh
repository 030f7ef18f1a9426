// Common to the passes of the backward. With probabilities P = softmax(S) or act(S), dA the gradient of A times the
// factor of P, and dP = dA V':
//
//     dS = P * (dP - delta), delta = sum of P * dP over keys - dlse      (softmax; else act'(S) * dP)
//     dQ = scale dS K,   dK = scale dS' Q,   dV = P' dA
//
// Two roundings would break the budget. A float32 log-sum-exp is off by a rounding, which is an error of all
// probabilities of its query, and a large one where scores are large. And delta as the sum of dA * A over channels
// would not cancel bit by bit against dP, as it must where a query has one key, or nearly all of its probability on one
// key. So a first pass (attention_query_stats.cu) sums up P and P * dP from the very numbers that later passes use:
// delta is the quotient of the two sums, and `inv_row_sum` the inverse of the first.
#pragma once

#include <cstdint>

#include "cuda/attention.h"
#include "cuda/attention_option_scores.cuh"
#include "cuda/attention_tiles.cuh"

namespace interformer {
namespace cuda {

// Arguments that the kernels of all passes have.
template <typename T>
struct BackwardArguments {
    AttentionProblem<T> problem;
    Heads<const T> grad_attn_out;                                    // times `inner_scale`
    float *lse = nullptr, *delta = nullptr, *inv_row_sum = nullptr;  // by query, as in `BackwardWorkspace`
    Plan plan{};

    explicit BackwardArguments(const Backward& call)
        : problem(call.in, call.workspace.rotated), grad_attn_out(call.grad_attn_out) {
        const BackwardWorkspace& workspace = call.workspace;
        if (workspace.lse) lse = static_cast<float*>(workspace.lse->data);
        if (workspace.delta) delta = static_cast<float*>(workspace.delta->data);
        if (workspace.inv_row_sum) inv_row_sum = static_cast<float*>(workspace.inv_row_sum->data);
    }

    // The number of a query under a head among the outputs.
    __device__ int64_t place(const Queries& queries, const PackedRow& row) const {
        return (queries.first + row.token) * problem.heads + row.head;
    }
    template <typename RowMasks>
    __device__ auto query_stats(const RowMasks& masks, const Queries& queries, const PackedRow& row) const {
        QueryStats<decltype(masks.key_range(0))> stats{{masks.key_range(row.token)}, 0.0f, 0.0f, 1.0f};
        if (row.token >= queries.count || lse == nullptr) return stats;
        const int64_t at = place(queries, row);
        stats.lse = lse[at];
        stats.delta = delta[at];
        stats.inv_row_sum = inv_row_sum[at];
        return stats;
    }
};

// Copies 16 queries of a warp and the gradients of their outputs to shared memory, and rotates the queries there.
template <typename T, int WIDTH>
__device__ inline void load_queries_and_grads(const AttentionMemory<T, WIDTH>& memory, const BackwardArguments<T>& g,
                                              const Queries& queries, const PackedRows& rows) {
    const AttentionProblem<T>& p = g.problem;
    cp_async_stationary(memory.stationary[0], p.q, p.channels, queries, rows);
    cp_async_stationary(memory.stationary[1], g.grad_attn_out, p.value_channels, queries, rows);
    cp_async_commit();
    if (p.rope.inside.queries) rotate_stationary(memory.stationary[0], rotary_queries(p, queries, rows));
}

}  // namespace cuda
}  // namespace interformer
