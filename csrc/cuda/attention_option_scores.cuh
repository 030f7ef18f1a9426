// Tiles of scores, with options of the variant or without: the type of their places says which. Without options these
// are the functions of attention_variant.cuh. With options, numbers that the plain functions do not make are mapped in
// a rolled loop by way of shared memory, two neighbours at a time: the code is there once for all options and numbers.
#pragma once

#include "cuda/attention_problem.cuh"

namespace interformer {
namespace cuda {

// The exponential of a sink relative to a log-sum-exp, which includes it.
__device__ inline float sink_prob(float sink, float lse) {
    return sink == -INFINITY ? 0.0f : exp2f((sink - lse) * kLog2E);
}

template <typename Places>
constexpr bool kHasOptions = false;
template <typename OneQuery>
constexpr bool kHasOptions<OptionScoresByQuery<OneQuery>> = true;
template <int COUNT>
constexpr bool kHasOptions<OptionScoresByKey<COUNT>> = true;

// Two neighbours of a tile: their places, and dropout's factors of their weights, 1 or 0. NaN times 0 stays NaN.
struct Neighbours {
    ScorePlace places[2];
    float weights[2];

    template <typename Places>
    __device__ Neighbours(const Options& options, const Places& at, int half, int column)
        : places{at.place(half, column), at.place(half, column + 1)} {
        bool kept[2];
        options.dropout.keeps(kept, at.row, places);
        weights[0] = kept[0] ? 1.0f : 0.0f;
        weights[1] = kept[1] ? 1.0f : 0.0f;
    }
};

// ---------------------------------------------------------------- forward

// Products become the numbers whose maximum an online softmax keeps.
template <typename T, int N, typename Places>
__device__ inline void order_scores(const AttentionProblem<T>& p, AccTile (&s)[N], float2* scratch, const Places& at) {
    if constexpr (kHasOptions<Places>) {
        if (p.options.maps_scores()) {
            for_each(s, [&](int, int, float& x) { x = p.variant.score(x); });
            map_each(s, scratch,
                     [&](int half, int column, float x) { return p.options.score(x, at.row, at.place(half, column)); });
            return;
        }
    }
    for_each(s, [&](int, int, float& x) { x = p.variant.ordered(x); });
}

// Weights that are dropped become zeros.
template <typename T, int N, typename Places>
__device__ inline void drop_probs(const AttentionProblem<T>& p, AccTile (&s)[N], float2* scratch, const Places& at) {
    if constexpr (kHasOptions<Places>) {
        if (!p.options.dropout.any) return;
        map_neighbours(s, scratch, [&](int half, int column, float (&x)[2]) {
            const Neighbours two(p.options, at, half, column);
#pragma unroll
            for (int i = 0; i < 2; ++i) x[i] *= two.weights[i];
        });
    }
}

// Products become pointwise weights.
template <typename T, int N, typename Places>
__device__ inline void pointwise_probs(const AttentionProblem<T>& p, AccTile (&s)[N], float2* scratch,
                                       const Places& at) {
    const Variant<T>& variant = p.variant;
    if constexpr (kHasOptions<Places>) {
        if (p.options.in_memory()) {
            for_each(s, [&](int, int, float& x) { x = variant.score(x); });
            map_each(s, scratch, [&](int half, int column, float x) {
                return variant.inner_scale * variant.prob(p.options.score(x, at.row, at.place(half, column)));
            });
            drop_probs(p, s, scratch, at);
            mask_out(s, at, 0.0f);
            return;
        }
    }
    scores_to_probs(variant, s, scratch, at);
}

// ---------------------------------------------------------------- backward

// How far the backward goes: to P and P * dP for sums of them, or to P with dropout and the gradients of products.
enum class Depth { scores, products };

// A score on its way back: the product that it is made of, itself, and dropout's factor of its weight.
struct ScoreBack {
    float product, score, weight;
};

// Calls `each(query, score_back, s, d)` for products `s` and gradients `d` of weights, then hides what is not seen.
template <typename T, int N, typename Places, typename Each>
__device__ inline void backward_in_memory(const AttentionProblem<T>& p, AccTile (&s)[N], AccTile (&d)[N],
                                          float2* scratch, const Places& at, Each&& each) {
    map_neighbours(s, d, scratch, [&](int half, int column, float (&x)[2], float (&g)[2]) {
        const Neighbours two(p.options, at, half, column);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float product = p.variant.score(x[i]);
            const ScoreBack back{product, p.options.score(product, at.row, two.places[i]), two.weights[i]};
            each(at.query(half, column + i), back, x[i], g[i]);
        }
    });
    mask_out(s, at, 0.0f);
    mask_out(d, at, 0.0f);
}

// Weights of a softmax, and gradients of its scores or products.
template <Depth DEPTH, typename T, int N, typename Places>
__device__ inline void softmax_backward_in_memory(const AttentionProblem<T>& p, AccTile (&s)[N], AccTile (&d)[N],
                                                  float2* scratch, const Places& at) {
    backward_in_memory(p, s, d, scratch, at, [&](const auto& query, const ScoreBack& back, float& x, float& g) {
        const float exponent = (back.score - query.lse) * kLog2E;
        const float prob = (kFromProducts<T> ? exp2_approx(exponent) : exp2f(exponent)) * query.inv_row_sum;
        g = prob * (__fmul_rn(g, back.weight) - query.delta);
        x = prob;
        if constexpr (DEPTH == Depth::products) {
            g *= p.options.score_grad(back.product) * p.variant.d_scores_scale;
            x = prob * back.weight;
        }
    });
}

// The same for pointwise weights, without `inner_scale`.
template <Depth DEPTH, typename T, int N, typename Places>
__device__ inline void pointwise_backward_in_memory(const AttentionProblem<T>& p, AccTile (&s)[N], AccTile (&d)[N],
                                                    float2* scratch, const Places& at) {
    const Variant<T>& variant = p.variant;
    backward_in_memory(p, s, d, scratch, at, [&](const auto&, const ScoreBack& back, float& x, float& g) {
        if constexpr (DEPTH == Depth::products) g *= variant.d_scores_scale;
        g = variant.d_score(back.score, g * back.weight);
        if constexpr (DEPTH == Depth::products) g *= p.options.score_grad(back.product);
        x = variant.prob(back.score) * back.weight;
    });
}

// Products and gradients of weights become weights and gradients of products, times `d_scores_scale`.
template <typename T, int N, typename Places>
__device__ inline void scores_backward(const AttentionProblem<T>& p, AccTile (&s)[N], AccTile (&d)[N], float2* scratch,
                                       const Places& at) {
    const bool softmax = p.variant.kind.softmax;
    if constexpr (kHasOptions<Places>) {
        if (p.options.in_memory()) {
            if (softmax) return softmax_backward_in_memory<Depth::products>(p, s, d, scratch, at);
            return pointwise_backward_in_memory<Depth::products>(p, s, d, scratch, at);
        }
    }
    if (softmax) return softmax_backward(p.variant, s, d, p.variant.d_scores_scale, at);
    pointwise_backward(p.variant, s, d, scratch, at);
}

// Products become any numbers, and gradients of weights those of scores, behind softcap and biases.
template <typename T, int N, typename Places>
__device__ inline void scores_gradients(const AttentionProblem<T>& p, AccTile (&s)[N], AccTile (&d)[N], float2* scratch,
                                        const Places& at) {
    if (p.variant.kind.softmax) return softmax_backward_in_memory<Depth::scores>(p, s, d, scratch, at);
    pointwise_backward_in_memory<Depth::scores>(p, s, d, scratch, at);
}

// Products and gradients of weights become probabilities of a softmax before dropout, and gradients of its scores.
template <typename T, int N, typename Places>
__device__ inline void softmax_scores_backward(const AttentionProblem<T>& p, AccTile (&s)[N], AccTile (&d)[N],
                                               float2* scratch, const Places& at) {
    if constexpr (kHasOptions<Places>)
        if (p.options.in_memory()) return softmax_backward_in_memory<Depth::scores>(p, s, d, scratch, at);
    softmax_backward(p.variant, s, d, 1.0f, at);
}

}  // namespace cuda
}  // namespace interformer
