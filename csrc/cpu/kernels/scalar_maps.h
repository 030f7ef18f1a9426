// Exponentials, activations and gates with their slopes, as loops that the compiler turns into vector code.
#pragma once

#include "common/scalar_maps.h"
#include "cpu/kernels/level.h"

INTERFORMER_LEVEL_BEGIN

// 2^n for a small n of either sign.
template <typename A>
inline A two_to(int n) {
    const double power = n < 0 ? 1.0 / static_cast<double>(uint64_t{1} << -n) : static_cast<double>(uint64_t{1} << n);
    return static_cast<A>(power);
}

// e^x, without branches, of a number or of a vector of them. x = n ln 2 + r with |r| <= ln 2 / 2, e^r by its Taylor
// polynomial of degree 7 (remainder below 6e-9 of it), 2^n by the exponent's bits in two factors, so that the smallest
// and largest results come out right. NaN stays: it compares with nothing.
template <typename Float, typename Int, typename Bits>
inline Float exponential_of(Float x) {
    const Float low = Float{} - 104.0f, high = Float{} + 89.0f;
    const Float bounded = x < low ? low : x;
    const Float inside = bounded > high ? high : bounded;
    const Float shifted = inside * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
    const Float n = shifted - 12582912.0f;
    const Float r = (inside - n * 0.693145752f) - n * 1.42860677e-6f;
    Float p = Float{} + 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    const Float power = 1.0f + (r + r * r * p);  // what is largest comes last, so that its rounding is the only one
    Int bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    const Int whole = bits - 0x4b400000, half = whole >> 1;
    const Bits first_bits = (Bits)(half + 127) << 23, second_bits = (Bits)(whole - half + 127) << 23;  // NaN's wrap
    Float first, second;
    std::memcpy(&first, &first_bits, sizeof first);
    std::memcpy(&second, &second_bits, sizeof second);
    return power * first * second;
}

inline float exponential(float x) {
    return exponential_of<float, int32_t, uint32_t>(x);
}
inline Vector<float> exponential(Vector<float> x) {
    return exponential_of<Vector<float>, Vector<int32_t>, Vector<uint32_t>>(x);
}

inline double exponential(double x) {
    return __builtin_exp(x);
}
inline Vector<double> exponential(Vector<double> x) {
    for (int64_t lane = 0; lane < kLanes<double>; ++lane) x[lane] = __builtin_exp(x[lane]);
    return x;
}

// 2^(x - down) for x <= 0 and a small `down` >= 0, as the softmax needs it: 0 below 2^-126. x = n + r with |r| <= 1/2;
// 2^r by the polynomial 1 + r q(r) with the least relative error (2e-9, computed with float64), 2^(n - down) by the
// exponent's bits, so that `down` costs no rounding. NaN stays.
inline Vector<float> power_of_two(Vector<float> x, int down) {
    const Vector<float> shifted = x + 12582912.0f;  // 1.5 * 2^23: rounds to an integer, which its last bits hold
    const Vector<float> r = x - (shifted - 12582912.0f);
    Vector<float> q = Vector<float>{} + 0.00015353362f;
    q = q * r + 0.00133988739f;
    q = q * r + 0.00961843692f;
    q = q * r + 0.0555033237f;
    q = q * r + 0.240226477f;
    q = q * r + 0.693147182f;
    Vector<uint32_t> bits;  // unsigned, since it wraps where the power is 0 or NaN
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + static_cast<uint32_t>(127 - down)) << 23;
    Vector<float> scale;
    std::memcpy(&scale, &bits, sizeof scale);
    const Vector<float> power = (q * r + 1.0f) * scale;
    return x < static_cast<float>(down - 126) ? Vector<float>{} : power;
}
inline Vector<double> power_of_two(Vector<double> x, int down) {
    for (int64_t lane = 0; lane < kLanes<double>; ++lane) x[lane] = __builtin_exp2(x[lane]);
    return x * two_to<double>(-down);
}

// Natural logarithm of x >= 1 (the sum of a softmax); of 0 some number, and NaN stays. x = 2^e m with m in
// [sqrt(1/2), sqrt(2)), and log m = 2 artanh t, t = (m - 1) / (m + 1), by its series (remainder below 1e-9).
inline Vector<float> logarithm(Vector<float> x) {
    Vector<uint32_t> bits;  // unsigned, since it wraps where x is not a number of a sum
    std::memcpy(&bits, &x, sizeof bits);
    const Vector<int32_t> exponent = (Vector<int32_t>)(bits - 0x3f3504f3u) >> 23;  // of x / sqrt(1/2)
    bits -= (Vector<uint32_t>)exponent << 23;
    Vector<float> m;
    std::memcpy(&m, &bits, sizeof m);
    const Vector<float> t = (m - 1.0f) / (m + 1.0f), square = t * t;
    Vector<float> series = Vector<float>{} + 1.0f / 9;
    series = series * square + 1.0f / 7;
    series = series * square + 1.0f / 5;
    series = series * square + 1.0f / 3;
    const Vector<float> log_m = 2.0f * t + 2.0f * t * square * series;
    const Vector<float> log = __builtin_convertvector(exponent, Vector<float>) * 0.693147182f + log_m;
    return x != x ? x : log;
}
inline Vector<double> logarithm(Vector<double> x) {
    for (int64_t lane = 0; lane < kLanes<double>; ++lane) x[lane] = __builtin_log(x[lane]);
    return x;
}

template <typename A>
inline A sigmoid(A x) {
    return A(1) / (A(1) + exponential(-x));
}

inline float error_function(float x) {
    return __builtin_erff(x);
}
inline double error_function(double x) {
    return __builtin_erf(x);
}
inline float hyperbolic_tangent(float x) {
    return __builtin_tanhf(x);
}
inline double hyperbolic_tangent(double x) {
    return __builtin_tanh(x);
}

// Distribution and density of the standard normal law.
template <typename A>
inline A normal_distribution(A x) {
    return A(0.5) * (A(1) + error_function(x * A(0.70710678118654752440)));
}
template <typename A>
inline A normal_density(A x) {
    return A(0.39894228040143267794) * exponential(A(-0.5) * x * x);
}

// Calls `each(i, f, slope)` for all i, where `value = f(x[i])` and `slope = f'(x[i])` are functions of x: one loop for
// each kind of map, so that the choice is made once and not for every number.
template <typename A, typename Each>
inline void over_activation(Activation kind, int64_t count, Each&& each) {
    switch (kind) {
        case Activation::identity:
            for (int64_t i = 0; i < count; ++i) each(i, [](A x) { return x; }, [](A) { return A(1); });
            return;
        case Activation::relu:
            for (int64_t i = 0; i < count; ++i)
                each(i, [](A x) { return x <= A(0) ? A(0) : x; }, [](A x) { return x <= A(0) ? A(0) : A(1); });
            return;
        case Activation::silu:
            for (int64_t i = 0; i < count; ++i)
                each(
                    i, [](A x) { return x * sigmoid(x); },
                    [](A x) {
                        const A s = sigmoid(x);
                        return s * (A(1) + x * (A(1) - s));
                    });
            return;
        case Activation::gelu:
            for (int64_t i = 0; i < count; ++i)
                each(
                    i, [](A x) { return x * normal_distribution(x); },
                    [](A x) { return normal_distribution(x) + x * normal_density(x); });
            return;
        case Activation::sigmoid:
            for (int64_t i = 0; i < count; ++i)
                each(
                    i, [](A x) { return sigmoid(x); },
                    [](A x) {
                        const A s = sigmoid(x);
                        return s * (A(1) - s);
                    });
            return;
        case Activation::tanh:
            for (int64_t i = 0; i < count; ++i)
                each(
                    i, [](A x) { return hyperbolic_tangent(x); },
                    [](A x) {
                        const A t = hyperbolic_tangent(x);
                        return A(1) - t * t;
                    });
            return;
    }
}

// x becomes factor * act(scale x).
template <typename A>
inline void activate(Activation kind, A* x, int64_t count, A scale = 1, A factor = 1) {
    over_activation<A>(kind, count, [=](int64_t i, auto value, auto) { x[i] = value(scale * x[i]) * factor; });
}

// x becomes act(scale x); slopes are multiplied by its derivative. Where relu's is 0, they are 0, overflowed or not.
template <typename A>
inline void activate_with_slopes(Activation kind, A* x, A* slopes, int64_t count, A scale = 1) {
    if (kind == Activation::relu) {
        for (int64_t i = 0; i < count; ++i) {
            const A inner = scale * x[i];
            slopes[i] = inner <= A(0) ? A(0) : slopes[i] * scale;
            x[i] = inner <= A(0) ? A(0) : inner;
        }
        return;
    }
    over_activation<A>(kind, count, [=](int64_t i, auto value, auto slope) {
        const A inner = scale * x[i];
        slopes[i] *= slope(inner) * scale;
        x[i] = value(inner);
    });
}

// a becomes G(a, gate).
template <typename A>
inline void apply_gate(const Gate& gating, A* a, const A* gate, int64_t count) {
    if (gating.inside)
        over_activation<A>(gating.activation, count,
                           [=](int64_t i, auto value, auto) { a[i] = value(a[i] * gate[i]); });
    else
        over_activation<A>(gating.activation, count,
                           [=](int64_t i, auto value, auto) { a[i] = a[i] * value(gate[i]); });
}

// `grad`, the gradient of G(a, gate), becomes that of a; `gate` becomes the gate's.
template <typename A>
inline void back_through_gate(const Gate& gating, const A* a, A* gate, A* grad, int64_t count) {
    if (gating.inside)
        over_activation<A>(gating.activation, count, [=](int64_t i, auto, auto slope) {
            const A inner = grad[i] * slope(a[i] * gate[i]), to_a = inner * gate[i];
            gate[i] = inner * a[i];
            grad[i] = to_a;
        });
    else
        over_activation<A>(gating.activation, count, [=](int64_t i, auto value, auto slope) {
            const A to_a = grad[i] * value(gate[i]);
            gate[i] = grad[i] * a[i] * slope(gate[i]);
            grad[i] = to_a;
        });
}

INTERFORMER_LEVEL_END
