// Functions of one number that the kernels apply, and their slopes. Which one is the same for all threads of a launch.
#pragma once

#include "common/scalar_maps.h"
#include "cuda/instructions.cuh"

namespace interformer {
namespace cuda {

// No difference of numbers that are nearly equal is taken: 1 - sigmoid(x) and 1 + erf(x) have no digits left where they
// are small, and exp(-x) is infinite where the sigmoid is not yet zero. What double has no digits for beside 1 is zero:
// there the definition, which does take these differences, is zero in every dtype.
constexpr float kBesideOne = 5.5511151e-17f;  // 2^-54

__device__ inline float sigmoid(float x) {
    const float e = expf(-fabsf(x));
    return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

// Its derivative, sigmoid(x) (1 - sigmoid(x)).
__device__ inline float sigmoid_slope(float x) {
    const float e = expf(-fabsf(x));
    return x > 0.0f && e < kBesideOne ? 0.0f : e / ((1.0f + e) * (1.0f + e));
}

// Distribution of the standard normal law.
__device__ inline float normal_distribution(float x) {
    const float twice = erfcf(x * -0.70710678f);
    return twice < kBesideOne ? 0.0f : 0.5f * twice;
}

__device__ inline float activate(float x, Activation kind) {
    switch (kind) {
        case Activation::identity:
            return x;
        case Activation::relu:
            return x < 0.0f ? 0.0f : x;
        case Activation::silu:
            return x * sigmoid(x);
        case Activation::gelu:
            return x * normal_distribution(x);
        case Activation::sigmoid:
            return sigmoid(x);
        case Activation::tanh:
            return tanhf(x);
    }
    return x;
}

// Derivative of `activate` by x.
__device__ inline float slope(float x, Activation kind) {
    switch (kind) {
        case Activation::identity:
            return 1.0f;
        case Activation::relu:
            return x <= 0.0f ? 0.0f : 1.0f;
        case Activation::silu:
            return sigmoid(x) * (1.0f + x * sigmoid(-x));
        case Activation::gelu:
            return normal_distribution(x) + x * 0.39894228f * expf(-0.5f * x * x);
        case Activation::sigmoid:
            return sigmoid_slope(x);
        case Activation::tanh:  // of 2 sigmoid(2 x) - 1, and even
            return 4.0f * sigmoid_slope(2.0f * fabsf(x));
    }
    return 1.0f;
}

}  // namespace cuda
}  // namespace interformer
