// The passes of dQ and of dK with dV share this file. With the weights P = softmax(S) or act(S), dA the gradient of A
// times post_scale, and dP = dA V':
//
//     dS = P * (dP - delta), delta = sum of P * dP over keys      (softmax; else act'(S) * dP)
//     dQ = scale dS K,   dK = scale dS' Q,   dV = P' dA
//
// The rounding of a log-sum-exp of float32 is an error of all weights of its query, and of large scores no small one;
// and the products in delta, were it the sum of dA * A over channels, would not cancel against those in dP bit by bit,
// as they must where a query has one key, or gives all its weight to one. So the sums of P and of P * dP are made
// first (attention_shares.cu), of the very numbers that come after: their quotient is delta, and one by the first is
// the query's share.
#pragma once

#include <cstdint>

#include "cuda/attention.h"
#include "cuda/attention_tiles.cuh"

namespace interformer {
namespace cuda {

// The arguments of these kernels.
template <typename T>
struct Gradient {
    AttentionProblem<T> problem;
    Heads<const T> grad;                                       // of A, times `inner_scale`
    float *lse = nullptr, *delta = nullptr, *share = nullptr;  // by query, as `AttentionSides` has them
    Plan plan{};

    Gradient(const AttentionInputs& in, const TensorView& grad_attn_out, const AttentionSides& sides)
        : problem(in), grad(grad_attn_out) {
        if (sides.lse) lse = static_cast<float*>(sides.lse->data);
        if (sides.delta) delta = static_cast<float*>(sides.delta->data);
        if (sides.share) share = static_cast<float*>(sides.share->data);
    }

    // Of a query token under a head, as outputs are numbered.
    __device__ int64_t place(const Queries& queries, const Units::Unit& unit) const {
        return (queries.first + unit.token) * problem.heads + unit.head;
    }
    __device__ Side side(const Queries& queries, const Units::Unit& unit, int keys) const {
        Side found{problem.masks.sight(unit.token, queries.count, keys), 0.0f, 0.0f, 1.0f, {}};
        if (unit.token >= queries.count || lse == nullptr) return found;
        const int64_t at = place(queries, unit);
        found.lse = lse[at];
        found.delta = delta[at];
        found.share = share[at];
        return found;
    }
};

// Calls `each(half, column, first, second)` for the numbers of two rows of blocks, place by place.
template <int N, typename Each>
__device__ inline void for_each_pair(Sums (&first)[N], Sums (&second)[N], Each&& each) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
        int i = 0;
        first[n].for_each_half([&](int half, int column, float& x) {
            each(half, n * 16 + column, x, second[n].values[i / 4][i % 4]);
            ++i;
        });
    }
}

// Products `s` become weights of a softmax, and their gradients `grad` those of the scores, times `factor`.
// `side(half, column)` is that of the query, and `seen(half, column)` whether it sees the key.
template <typename T, int N, typename SideOf, typename Seen>
__device__ inline void weigh_softmax(const AttentionProblem<T>& p, Sums (&s)[N], Sums (&grad)[N], float factor,
                                     SideOf&& side, Seen&& seen) {
    for_each_pair(s, grad, [&](int half, int column, float& x, float& g) {
        const Side& query = side(half, column);
        const float weight = exp2f((p.scored(x) - query.lse) * kLog2E) * query.share;
        const bool counts = seen(half, column);
        x = counts ? weight : 0.0f;
        g = counts ? weight * (g - query.delta) * factor : 0.0f;
    });
}

// The same of any score, times `slope_scale`.
template <typename T, int N, typename SideOf, typename Seen>
__device__ inline void weigh(const AttentionProblem<T>& p, Sums (&s)[N], Sums (&grad)[N], float2* scratch,
                             SideOf&& side, Seen&& seen) {
    if (p.score.softmax) return weigh_softmax(p, s, grad, p.slope_scale, side, seen);
    // Every map of 0 is 0.
    for_each_pair(s, grad, [&](int half, int column, float& x, float& g) {
        const bool counts = seen(half, column);
        x = counts ? p.scored(x) : 0.0f;
        g = counts ? g * p.slope_scale : 0.0f;
    });
    map_one_by_one(s, grad, scratch, [&](float& x, float& g) {
        // Where relu's slope is 0, the gradient is, even if it overflowed.
        g = p.score.activation == Activation::relu && x <= 0.0f ? 0.0f : g * slope(x, p.score.activation);
        x = activate(x, p.score.activation);
    });
}

}  // namespace cuda
}  // namespace interformer
