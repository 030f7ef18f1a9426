# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs
"""Softmax along the tokens of each row in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from interformer_kernels._calls import SoftmaxCall
from interformer_kernels._launch.tensors import readable
from interformer_kernels._triton import _run
from interformer_kernels._triton._arguments import Table
from interformer_kernels._triton._maps import LOG2_E, exp2, narrow
from interformer_kernels._triton._rows import partition
from interformer_kernels._triton._tiles import Tiles

_TILE_NUMBERS = 1024  # of a step, at most
_MOST_HEADS, _MOST_TOKENS = 64, 128  # of a step
_TAIL_NUMBERS = 1024  # of a program that writes zeros


@triton.jit
def _load(x, tokens, o_h, mask, OTHER: tl.constexpr):
    return tl.load(x.pointer + tokens[:, None] * x.row + o_h[None, :], mask=mask, other=OTHER).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "tokens", "tails"])
def softmax_rows(
    scores, grad_out, out, offsets, rows, tokens, tails,
    HEADS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """The weights of one row under a block of heads; with a `grad_out` instead the gradients of the scores.

    The first `tails` programs write the zeros of the tail.
    """
    blocks: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    program = tl.program_id(0) - tails
    row = tl.where(program < 0, rows, program // blocks)
    first, count = partition(row, offsets, rows, tokens)
    if program < 0:
        o_n = tl.program_id(0).to(tl.int64) * TAIL + tl.arange(0, TAIL)
        m_tail = (o_n >= first * HEADS) & (o_n < (first + count) * HEADS)
        tl.store(out + o_n, tl.zeros([TAIL], out.dtype.element_ty), mask=m_tail)
        return
    DTYPE: tl.constexpr = scores.pointer.dtype.element_ty
    o_h = program % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    m_h = (o_h < HEADS)[None, :]
    most = tl.full([BLOCK_H], float("-inf"), tl.float32)
    base = tl.zeros([BLOCK_H], tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    products = tl.zeros([BLOCK_H], tl.float32)
    for start in range(0, count, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        m_in = (t < count)[:, None] & m_h  # [BLOCK_T, BLOCK_H]
        b_s = _load(scores, first + t, o_h, m_in, float("-inf"))
        largest = tl.maximum(most, tl.max(b_s, 0))
        # Where all scores are -inf so far, differences to 0 are -inf, and no NaN.
        base = tl.where(largest == float("-inf"), 0.0, largest)
        b_e = exp2((b_s - base[None, :]) * LOG2_E, DTYPE)
        shrunk = exp2((most - base) * LOG2_E, DTYPE)
        total = total * shrunk + tl.sum(b_e, 0)
        if grad_out is not None:
            products = products * shrunk + tl.sum(b_e * _load(grad_out, first + t, o_h, m_in, 0.0), 0)
        most = largest
    factor = 1.0 / tl.where(total == 0.0, 1.0, total)  # where nothing is visible, all exponentials are 0
    delta = products * factor
    for start in range(0, count, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        m_in = (t < count)[:, None] & m_h
        b_s = _load(scores, first + t, o_h, m_in, float("-inf"))
        b_p = exp2((b_s - base[None, :]) * LOG2_E, DTYPE) * factor[None, :]
        if grad_out is not None:
            b_p *= _load(grad_out, first + t, o_h, m_in, 0.0) - delta[None, :]
        tl.store(out + (first + t)[:, None] * HEADS + o_h[None, :], narrow(b_p, out.dtype.element_ty), mask=m_in)


def _rows(call: SoftmaxCall, grad_out: Tensor | None) -> Tensor:
    scores, offsets, grad = readable(call.scores), readable(call.offsets), readable(grad_out)
    out = scores.new_empty(scores.shape)
    (tokens, heads), rows = scores.shape, offsets.shape[0] - 1
    if out.numel():
        block_h = min(_MOST_HEADS, triton.next_power_of_2(heads))
        block_t = min(_MOST_TOKENS, _TILE_NUMBERS // block_h)
        tails = -(-tokens * heads // _TAIL_NUMBERS)
        _run.start(
            softmax_rows, tails + rows * -(-heads // block_h),
            Table(scores, scores.stride(0)), None if grad is None else Table(grad, grad.stride(0)), out, offsets,
            rows, tokens, tails,
            HEADS=heads, BLOCK_T=block_t, BLOCK_H=block_h, TAIL=_TAIL_NUMBERS,
            lead=scores, tiles=Tiles(block_t, block_h, max(1, block_t * block_h // 256), 1),
        )  # fmt: skip
    return out


def forward(call: SoftmaxCall) -> Tensor:
    """The output `[T, H]`."""
    return _rows(call, None)


def backward(call: SoftmaxCall, grad_out: Tensor) -> Tensor:
    """The gradient of `scores`."""
    return _rows(call, grad_out)
