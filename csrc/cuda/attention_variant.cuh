// The attention variant on a GPU: how a product of a query with a key becomes a score and a probability, the derivative
// of both, and which keys a query sees. The forward, the statistics pass, dQ and dK/dV all take these from here.
//
// Masks come after the map of scores: a masked key has probability 0 and gradient 0 whatever the map of its score is.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/attention_variant.h"
#include "common/element.h"
#include "cuda/acc_tile.cuh"
#include "cuda/attention_masks.cuh"
#include "cuda/elements.h"
#include "cuda/maps.cuh"

namespace interformer {
namespace cuda {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// ---------------------------------------------------------------- one score

// The factor of a sum as two: `inner` multiplies the terms, `outer` the sum.
struct SumFactors {
    double inner, outer;
};

// All of the factor multiplies probabilities before they are summed up where it makes them smaller, so that no sum
// overflows whose scaled value is finite. float16 takes less of it, since small probabilities lose digits as operands.
template <typename T>
SumFactors probs_factors(const AttentionVariant& variant) {
    constexpr double min = std::is_same_v<T, Float16> ? 1.0 / 64 : 0.0;
    const double factor = variant.post_scale, size = std::abs(factor);
    const double inner = size > 1.0 ? 1.0 : size < min ? min : factor;
    return {inner, inner == factor ? 1.0 : factor / inner};
}

// The same for gradients of scores and their factor `scale`, of which float16 takes none.
template <typename T>
SumFactors d_scores_factors(const AttentionVariant& variant) {
    if (!std::is_same_v<T, Float16> && std::abs(variant.scale) <= 1.0) return {variant.scale, 1.0};
    return {1.0, variant.scale};
}

// Whether the forward takes exponents from products without scores in between. Operands of 16 bits are rounded so much
// more that an approximate exponential serves, and the scale may be multiplied last. Since the maximum is subtracted
// before, its own exponential is exact, however large scores are, and a confident softmax stays exactly one-hot.
template <typename T>
constexpr bool kFromProducts = sizeof(T) == 2;

// The variant as kernels of elements `T` compute it.
template <typename T>
struct Variant {
    Score kind;
    Masks masks;
    float scale;
    float inner_scale;     // factor of pointwise probabilities
    float d_scores_scale;  // factor of dS
    float exponent_scale;  // of products that count from the maximum; never 0, which would hide masks
    float max_scale;       // factor of a maximum of products that makes it one of scores
    bool negates;          // the softmax keeps the maximum of negated products

    // `maps_scores`: scores are mapped before the softmax, so it keeps the maximum of these.
    Variant(const AttentionVariant& variant, bool maps_scores)
        : kind(variant.score),
          masks(variant),
          scale(static_cast<float>(variant.scale)),
          inner_scale(static_cast<float>(probs_factors<T>(variant).inner)),
          d_scores_scale(static_cast<float>(d_scores_factors<T>(variant).inner)),
          exponent_scale(std::max(static_cast<float>((maps_scores ? 1.0 : std::abs(variant.scale)) * kLog2E),
                                  std::numeric_limits<float>::denorm_min())),
          max_scale(static_cast<float>(maps_scores ? 1.0 : std::abs(variant.scale))),
          negates(variant.scale < 0 && !maps_scores) {}

    // The score of a product, rounded by itself in every pass: a compiler that fused the multiplication with what comes
    // after would give large scores other numbers in one pass than in the next.
    __device__ float score(float product) const { return __fmul_rn(product, scale); }

    // The number whose maximum an online softmax keeps: a score, or a product, where queries are negated before if
    // `negates_queries`.
    __device__ float ordered(float product) const { return kFromProducts<T> ? product : score(product); }
    __device__ bool negates_queries() const { return kFromProducts<T> && kind.softmax && negates; }
    // The score that belongs to such a maximum.
    __device__ float max_score(float row_max) const {
        return kFromProducts<T> && row_max != -INFINITY ? __fmul_rn(row_max, max_scale) : row_max;
    }
    // The exponential of a score that lies so far above the maximum, times a power of two.
    __device__ float exponential(float above, float power) const {
        if constexpr (!kFromProducts<T>) return exp2f(above * kLog2E) * power;
        return exp2_approx(fmaf(above, exponent_scale, static_cast<float>((__float_as_uint(power) >> 23)) - 127.0f));
    }

    // A pointwise score's probability, and the gradient of the score given that of the probability (times `scale`).
    __device__ float prob(float score) const { return activate(score, kind.activation); }
    __device__ float d_score(float score, float d_prob) const {
        // Where relu's derivative is 0, the gradient is, even if `d_prob` overflowed.
        if (kind.activation == Activation::relu && score <= 0.0f) return 0.0f;
        return d_prob * activation_grad(score, kind.activation);
    }
};

// ---------------------------------------------------------------- tiles of scores, forward

// Running maximum and sum of an online softmax, for the two rows of a lane. The sum is over this lane's columns alone,
// and relative to the maximum.
struct OnlineSoftmax {
    float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {};
};

// One more tile into an online softmax: `Variant::ordered` numbers become probabilities relative to the new maximum,
// times `prob_scale`. Accumulators so far are to be multiplied by `alpha`. `at` has the places of the scores.
template <typename T, int N, typename Places>
__device__ inline void online_softmax_update(const Variant<T>& variant, AccTile (&s)[N], float prob_scale,
                                             OnlineSoftmax& softmax, float (&alpha)[2], const Places& at) {
    mask_out(s, at, -INFINITY);
    float row_max[2] = {softmax.row_max[0], softmax.row_max[1]}, base[2];
    for_each(s, [&](int half, int, float& x) { row_max[half] = fmaxf(row_max[half], x); });
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float before = softmax.row_max[i], now = quad_max(row_max[i]);
        base[i] = fmaxf(now, -kLargest<float>);  // where no key is seen yet, all probabilities are 0
        alpha[i] = variant.exponential(before - base[i], 1.0f);
        softmax.row_max[i] = now;
        softmax.row_sum[i] *= alpha[i];
    }
    for_each(s, [&](int half, int, float& x) {
        x = variant.exponential(x - base[half], prob_scale);
        softmax.row_sum[half] += x;
    });
}

// Products become pointwise probabilities. `scratch` is this lane's column of shared memory.
template <typename T, int N, typename Places>
__device__ inline void scores_to_probs(const Variant<T>& variant, AccTile (&s)[N], float2* scratch, const Places& at) {
    for_each(s, [&](int, int, float& x) { x = variant.score(x); });
    map_rolled(s, scratch, [&](float& x) { x = variant.inner_scale * variant.prob(x); });
    mask_out(s, at, 0.0f);
}

// ---------------------------------------------------------------- tiles of scores, backward

// Products `s` become probabilities of a softmax, and gradients `d` of the probabilities become those of the scores,
// times `scale`.
template <typename T, int N, typename Places>
__device__ inline void softmax_backward(const Variant<T>& variant, AccTile (&s)[N], AccTile (&d)[N], float scale,
                                        const Places& at) {
    for_each_pair(s, d, [&](int half, int column, float& x, float& g) {
        const auto query = at.query(half, column);
        const float exponent = (variant.score(x) - query.lse) * kLog2E;
        x = (kFromProducts<T> ? exp2_approx(exponent) : exp2f(exponent)) * query.inv_row_sum;
        g = x * (g - query.delta) * scale;
    });
    mask_out(s, at, 0.0f);
    mask_out(d, at, 0.0f);
}

// The same for pointwise probabilities, without `inner_scale`.
template <typename T, int N, typename Places>
__device__ inline void pointwise_backward(const Variant<T>& variant, AccTile (&s)[N], AccTile (&d)[N], float2* scratch,
                                          const Places& at) {
    for_each_pair(s, d, [&](int, int, float& x, float& g) {
        x = variant.score(x);
        g = g * variant.d_scores_scale;
    });
    map_rolled(s, d, scratch, [&](float& x, float& g) {
        g = variant.d_score(x, g);
        x = variant.prob(x);
    });
    mask_out(s, at, 0.0f);
    mask_out(d, at, 0.0f);
}

}  // namespace cuda
}  // namespace interformer
