// Functions of one number that the kernels apply, and their slopes. Which one is the same for all threads of a launch.
#pragma once

#include "common/scalar_maps.h"
#include "cuda/instructions.cuh"

namespace interformer {
namespace cuda {

__device__ inline float sigmoid(float x) {
    return 1.0f / (1.0f + expf(-x));
}

// Distribution of the standard normal law.
__device__ inline float normal_distribution(float x) {
    return 0.5f * (1.0f + erff(x * 0.70710678f));
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
            return x > 0.0f ? 1.0f : 0.0f;
        case Activation::silu: {
            const float g = sigmoid(x);
            return g * (1.0f + x * (1.0f - g));
        }
        case Activation::gelu:
            return normal_distribution(x) + x * 0.39894228f * expf(-0.5f * x * x);
        case Activation::sigmoid: {
            const float g = sigmoid(x);
            return g * (1.0f - g);
        }
        case Activation::tanh: {
            const float h = tanhf(x);
            return 1.0f - h * h;
        }
    }
    return 1.0f;
}

}  // namespace cuda
}  // namespace interformer
