// Scalar functions that the kernels apply, and their derivatives. All threads of a launch take the same branch.
#pragma once

#include "common/activation_names.h"
#include "cuda/instructions.cuh"

namespace interformer {
namespace cuda {

// None of them subtracts nearly equal numbers: 1 - sigmoid(x) and 1 + erf(x) lose all digits where they are small, and
// exp(-x) is infinite where the sigmoid is not yet zero. Numbers too small to change 1 in double count as zero: the
// definition takes these differences, and is zero there in every dtype.
constexpr float kBesideOne = 5.5511151e-17f;  // 2^-54

__device__ inline float sigmoid(float x) {
    const float e = expf(-fabsf(x));
    return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

// The derivative of the sigmoid, sigmoid(x) (1 - sigmoid(x)).
__device__ inline float sigmoid_grad(float x) {
    const float e = expf(-fabsf(x));
    return x > 0.0f && e < kBesideOne ? 0.0f : e / ((1.0f + e) * (1.0f + e));
}

// Distribution function of the standard normal distribution.
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
__device__ inline float activation_grad(float x, Activation kind) {
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
            return sigmoid_grad(x);
        case Activation::tanh:  // tanh(x) = 2 sigmoid(2 x) - 1, whose derivative is even
            return 4.0f * sigmoid_grad(2.0f * fabsf(x));
    }
    return 1.0f;
}

}  // namespace cuda
}  // namespace interformer
