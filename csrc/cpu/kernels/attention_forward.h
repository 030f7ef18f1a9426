// Forward of attention: rows of few queries are read token by token under all heads, others take tiles of queries in
// the lanes of vectors, one key/value head after another.
#pragma once

#include "cpu/kernels/few_queries_forward.h"
#include "cpu/kernels/query_lanes_forward.h"

INTERFORMER_ISA_BEGIN

template <typename T>
class AttentionForward {
  public:
    static int64_t memory(const AttentionProblem& p) {
        const AttentionForward forward(p, nullptr);
        return max(forward.few_queries_.bytes(), forward.query_lanes_.bytes());
    }

    static void run(const AttentionProblem& p, const AttentionTask& task, void* memory) {
        AttentionForward forward(p, memory);
        for_each_row(task, forward.few_queries_,
                     [&](int64_t row, int64_t kv_head) { forward.query_lanes_.run_row(task, row, kv_head); });
    }

  private:
    AttentionForward(const AttentionProblem& problem, void* memory)
        : few_queries_(problem, memory), query_lanes_(problem, memory) {}

    // In the same memory: a thread computes one row at a time.
    const FewQueriesForward<T> few_queries_;
    QueryLanesForward<T> query_lanes_;
};

INTERFORMER_ISA_END
