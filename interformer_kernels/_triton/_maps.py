# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs
"""Pointwise functions of the kernels, their derivatives, and products of tiles."""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter multiplies bfloat16 tiles as if their bits were integers; widened, they are right.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# ln 2 as a sum of two numbers; products of the first with whole numbers below 2^14 are exact.
_LN_2_HIGH = tl.constexpr(0.693359375)
_LN_2_LOW = tl.constexpr(-2.12194440e-4)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """`a @ b` of two tiles of one dtype, summed in float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """Float32 rounded to the nearest number of a dtype; the interpreter itself would truncate to bfloat16."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # The rounding of a NaN whose last bits are set would carry into its sign.
        return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def power(n):
    """`2^n` for whole numbers `n` from -126 to 127, exactly; 0 for -127, infinity for 128."""
    return ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp2(x, DTYPE: tl.constexpr):
    """`2^x`; zero where float32 has no normal number.

    In float32 the error is at most 1.2 units of the last place; the instruction `ex2.approx` errs by up to 4.
    """
    if tl.float32 == DTYPE:
        # Comparisons with NaN are false, so a NaN stays.
        x = tl.where(x < -127.0, -127.0, tl.where(x > 128.0, 128.0, x))
        n = tl.floor(x + 0.5)
        r = x - n
        p = 1.535336188319500e-4 * r + 1.339887440266574e-3
        p = p * r + 9.618437357674640e-3
        p = p * r + 5.550332471162809e-2
        p = p * r + 2.402264791363012e-1
        p = p * r + 6.931472028550421e-1
        y = (p * r + 1.0) * power(n)
    else:
        y = tl.exp2(x)
    return y


@triton.jit
def _exp(x, FP32: tl.constexpr):
    """`e^x` for `x <= 0`; zero where float32 has no normal number.

    With FP32 the error is one rounding however far `x` is from 0; the rounding of `x * log2(e)` grows with `|x|`.
    """
    if FP32:
        # Comparisons with NaN are false, so a NaN stays.
        x = tl.where(x < -88.0, -88.0, x)
        n = tl.floor(x * LOG2_E + 0.5)
        r = (x - n * _LN_2_HIGH) - n * _LN_2_LOW
        p = 1.9875691500e-4 * r + 1.3981999507e-3
        p = p * r + 8.3334519073e-3
        p = p * r + 4.1665795894e-2
        p = p * r + 1.6666665459e-1
        p = p * r + 5.0000001201e-1
        y = (p * r * r + r + 1.0) * power(tl.where(n < -126.0, -127.0, n))
    else:
        y = tl.exp2(x * LOG2_E)
    return y


@triton.jit
def _logistic(x, FP32: tl.constexpr):
    """`sigmoid(x)` and `sigmoid(-x)`; neither is computed as 1 minus the other, which would cancel."""
    e = _exp(-tl.abs(x), FP32)
    larger = tl.div_rn(1.0, 1.0 + e) if FP32 else 1.0 / (1.0 + e)
    smaller = e * larger
    return tl.where(x < 0, smaller, larger), tl.where(x < 0, larger, smaller)


@triton.jit
def _tanh(x, FP32: tl.constexpr):
    """A polynomial near 0, where `(1 - e) / (1 + e)` would cancel to its rounding."""
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    _, e = _logistic(2.0 * tl.abs(x), FP32)
    far = 1.0 - 2.0 * e
    return tl.where(tl.abs(x) < 0.625, p * z * x + x, tl.where(x < 0, -far, far))


@triton.jit
def activate(x, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """The activation of this name, to the rounding of DTYPE everywhere."""
    FP32: tl.constexpr = tl.float32 == DTYPE
    if KIND == "identity":
        y = x
    elif KIND == "relu":
        y = tl.where(x < 0, 0.0, x)
    elif KIND == "silu":
        g, _ = _logistic(x, FP32)
        y = x * g
    elif KIND == "gelu":
        y = 0.5 * x * (1.0 + tl.math.erf(x * _SQRT_HALF))
    elif KIND == "sigmoid":
        y, _ = _logistic(x, FP32)
    else:
        tl.static_assert(KIND == "tanh")
        y = _tanh(x, FP32)
    return y


@triton.jit
def activation_grad(x, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """Derivative of the activation of this name, as exact as `activate`."""
    FP32: tl.constexpr = tl.float32 == DTYPE
    if KIND == "identity":
        y = tl.zeros_like(x) + 1.0
    elif KIND == "relu":
        y = tl.where(x <= 0, 0.0, 1.0)
    elif KIND == "silu":
        g, rest = _logistic(x, FP32)
        y = g * (1.0 + x * rest)
    elif KIND == "gelu":
        cumulated = 0.5 * (1.0 + tl.math.erf(x * _SQRT_HALF))
        y = cumulated + x * _INV_SQRT_2PI * _exp(-0.5 * x * x, FP32)
    elif KIND == "sigmoid":
        g, rest = _logistic(x, FP32)
        y = g * rest
    else:
        tl.static_assert(KIND == "tanh")
        # 1 - tanh(x)^2, without cancellation.
        g, rest = _logistic(2.0 * x, FP32)
        y = 4.0 * g * rest
    return y
