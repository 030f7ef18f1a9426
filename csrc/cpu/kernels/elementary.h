// Elementary functions of numbers and vectors. Loops over them become vector code, which rests on their being inlined:
// left to the compiler, it stopped once there were enough loops, and gates took four times as long.
#pragma once

#include "cpu/kernels/isa.h"

INTERFORMER_ISA_BEGIN

// 2^n for a small n of either sign.
template <typename A>
inline A exp2_of(int n) {
    const double power = n < 0 ? 1.0 / static_cast<double>(uint64_t{1} << -n) : static_cast<double>(uint64_t{1} << n);
    return static_cast<A>(power);
}

// e^x without branches, for a number or a vector. x = n ln 2 + r with |r| <= ln 2 / 2; e^r is its Taylor polynomial of
// degree 7 (relative remainder below 6e-9); 2^n comes from the exponent's bits in two factors, so that the smallest and
// largest results are right. A NaN stays NaN, since its comparisons are false.
template <typename Float, typename Int, typename Bits>
INTERFORMER_INLINE Float exponential_of(Float x) {
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
    const Float power = 1.0f + (r + r * r * p);  // the largest term is added last, so that only its rounding counts
    Int bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    const Int whole = bits - 0x4b400000, half = whole >> 1;
    const Bits first_bits = (Bits)(half + 127) << 23, second_bits = (Bits)(whole - half + 127) << 23;  // wraps for NaN
    Float first, second;
    std::memcpy(&first, &first_bits, sizeof first);
    std::memcpy(&second, &second_bits, sizeof second);
    return power * first * second;
}

INTERFORMER_INLINE float exponential(float x) {
    return exponential_of<float, int32_t, uint32_t>(x);
}
INTERFORMER_INLINE Vector<float> exponential(Vector<float> x) {
    return exponential_of<Vector<float>, Vector<int32_t>, Vector<uint32_t>>(x);
}

INTERFORMER_INLINE double exponential(double x) {
    return __builtin_exp(x);
}
INTERFORMER_INLINE Vector<double> exponential(Vector<double> x) {
    for (int64_t lane = 0; lane < kLanes<double>; ++lane) x[lane] = __builtin_exp(x[lane]);
    return x;
}

// 2^(x - down) for x <= 0 and a small `down` >= 0, as the softmax needs it; 0 below 2^-126. x = n + r with |r| <= 1/2;
// 2^r is the minimax polynomial 1 + r q(r) (relative error 2e-9, computed with float64); 2^(n - down) comes from the
// exponent's bits, so that `down` costs no rounding. A NaN stays NaN.
INTERFORMER_INLINE Vector<float> power_of_two(Vector<float> x, int down) {
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
    return x * exp2_of<double>(-down);
}

// `power_of_two` with a fixed `down`, for loops over many vectors. AVX-512 rounds to an integer and scales by a power
// of two in an instruction each; `down` lies in the polynomial's coefficients.
template <typename A>
class PowerOfTwo {
  public:
    explicit PowerOfTwo(int down) : down_(down) {}
    INTERFORMER_INLINE Vector<A> operator()(Vector<A> x) const { return power_of_two(x, down_); }

  private:
    int down_;
};
#ifdef __AVX512F__
template <>
class PowerOfTwo<float> {
  public:
    explicit PowerOfTwo(int down) : least_(Vector<float>{} + static_cast<float>(down - 126)) {
        constexpr float kCoefficients[] = {
            0.00015353362f, 0.00133988739f, 0.00961843692f, 0.0555033237f, 0.240226477f, 0.693147182f, 1.0f};
        const float scale = exp2_of<float>(-down);
        for (int i = 0; i < kTerms; ++i) coefficients_[i] = Vector<float>{} + kCoefficients[i] * scale;
    }
    INTERFORMER_INLINE Vector<float> operator()(Vector<float> x) const {
        constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        const Vector<float> n = _mm512_maskz_roundscale_ps(0xffff, x, kNearest), r = x - n;
        Vector<float> power = coefficients_[0];
#pragma GCC unroll 8
        for (int i = 1; i < kTerms; ++i) power = power * r + coefficients_[i];
        // Smaller results would be subnormal numbers, which cost a hundred times as much.
        return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, least_, _CMP_NLT_UQ), power, n);
    }

  private:
    static constexpr int kTerms = 7;
    Vector<float> coefficients_[kTerms], least_;
};
#endif

// The natural logarithm of x >= 1 (the row_sum of a softmax). A NaN stays NaN; the result for 0 has no meaning.
// x = 2^e m with m in [sqrt(1/2), sqrt(2)), and log m = 2 artanh t with t = (m - 1) / (m + 1), by its series (remainder
// below 1e-9).
INTERFORMER_INLINE Vector<float> logarithm(Vector<float> x) {
    Vector<uint32_t> bits;  // unsigned, since it wraps for numbers below 1
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
INTERFORMER_INLINE A sigmoid(A x) {
    return A(1) / (A(1) + exponential(-x));
}

INTERFORMER_INLINE float error_function(float x) {
    return __builtin_erff(x);
}
INTERFORMER_INLINE double error_function(double x) {
    return __builtin_erf(x);
}
INTERFORMER_INLINE float hyperbolic_tangent(float x) {
    return __builtin_tanhf(x);
}
INTERFORMER_INLINE double hyperbolic_tangent(double x) {
    return __builtin_tanh(x);
}

// The same for vectors: a rational function of x^2 times x, fitted to a relative error of 2e-8 (computed with float64);
// beyond 9.1 the result is 1 to the last bit. A NaN stays NaN.
INTERFORMER_INLINE Vector<float> hyperbolic_tangent(Vector<float> x) {
    const Vector<float> most = Vector<float>{} + 9.1f;
    const Vector<float> above = x > most ? most : x, inside = above < -most ? -most : above, square = inside * inside;
    Vector<float> p = Vector<float>{} + 1.31764655e-08f, q = Vector<float>{} + 7.70361512e-07f;
    p = p * square + 2.04804339e-05f;
    q = q * square + 3.27284644e-04f;
    p = p * square + 3.48776668e-03f;
    q = q * square + 2.58472222e-02f;
    p = p * square + 1.33744387e-01f;
    q = q * square + 4.67077526e-01f;
    p = p * square + 1.0f;
    q = q * square + 1.0f;
    return inside * p / q;
}
INTERFORMER_INLINE Vector<double> hyperbolic_tangent(Vector<double> x) {
    for (int64_t lane = 0; lane < kLanes<double>; ++lane) x[lane] = __builtin_tanh(x[lane]);
    return x;
}

// Distribution function and density of the standard normal distribution.
template <typename A>
INTERFORMER_INLINE A normal_distribution(A x) {
    return A(0.5) * (A(1) + error_function(x * A(0.70710678118654752440)));
}
template <typename A>
INTERFORMER_INLINE A normal_density(A x) {
    return A(0.39894228040143267794) * exponential(A(-0.5) * x * x);
}

INTERFORMER_ISA_END
