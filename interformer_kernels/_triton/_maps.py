"""Functions of one number that the kernels apply, their derivatives, and products of tiles."""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter multiplies bfloat16 tiles as if their bits were integers; widened, they are right.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_MINUS_TWO_LOG2_E = tl.constexpr(-2.8853900817779268)
_MINUS_HALF_LOG2_E = tl.constexpr(-0.7213475204444817)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """`a @ b` of two tiles of one dtype, summed in float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """Float32 rounded to the nearest number of a dtype; the interpreter would cut bfloat16 short."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # A NaN whose last bits are set must not carry over into its sign.
        return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def _tanh(x):
    e = tl.exp2(tl.abs(x) * _MINUS_TWO_LOG2_E)
    y = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -y, y)


@triton.jit
def activate(x, KIND: tl.constexpr):
    """The activation of this name."""
    if KIND == "identity":
        y = x
    elif KIND == "relu":
        y = tl.where(x < 0, 0.0, x)
    elif KIND == "silu":
        y = x * tl.sigmoid(x)
    elif KIND == "gelu":
        y = 0.5 * x * (1.0 + tl.math.erf(x * _SQRT_HALF))
    elif KIND == "sigmoid":
        y = tl.sigmoid(x)
    else:
        tl.static_assert(KIND == "tanh")
        y = _tanh(x)
    return y


@triton.jit
def slope(x, KIND: tl.constexpr):
    """Derivative of the activation of this name."""
    if KIND == "identity":
        y = x * 0.0 + 1.0
    elif KIND == "relu":
        y = tl.where(x > 0, 1.0, 0.0)
    elif KIND == "silu":
        g = tl.sigmoid(x)
        y = g * (1.0 + x * (1.0 - g))
    elif KIND == "gelu":
        cumulated = 0.5 * (1.0 + tl.math.erf(x * _SQRT_HALF))
        y = cumulated + x * _INV_SQRT_2PI * tl.exp2(x * x * _MINUS_HALF_LOG2_E)
    elif KIND == "sigmoid":
        g = tl.sigmoid(x)
        y = g * (1.0 - g)
    else:
        tl.static_assert(KIND == "tanh")
        h = _tanh(x)
        y = 1.0 - h * h
    return y
