# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs
"""Weighted sums of the values of each row in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from interformer_kernels._calls import WeightedSumCall
from interformer_kernels._launch.tensors import readable
from interformer_kernels._triton import _run
from interformer_kernels._triton._arguments import KeyOperand, Table
from interformer_kernels._triton._maps import narrow
from interformer_kernels._triton._rows import find, slots, span
from interformer_kernels._triton._tiles import Tiles, padded

_TILE_NUMBERS = 2048  # of a step
_MOST_CHANNELS = 128  # of a step


@triton.jit(do_not_specialize=["rows", "tokens"])
def weighted_sums(
    weights, v, out, offsets, rows, tokens,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The sum of one row under a head, over a block of channels, its tokens in order."""
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    row = tl.program_id(0) // (HEADS * blocks)
    head = (tl.program_id(0) // blocks % HEADS).to(tl.int64)
    first, count = span(offsets, row, rows, tokens)
    o_d = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, count, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        m_t = t < count
        b_w = tl.load(weights.pointer + (first + t) * weights.row + head, mask=m_t, other=0.0).to(tl.float32)
        p_v = (first + t)[:, None] * v.token + head * v.head + o_d[None, :]
        b_v = tl.load(v.pointer + p_v, mask=m_t[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)
        acc += tl.sum(b_w[:, None] * b_v, 0)
    p_out = (row.to(tl.int64) * HEADS + head) * D + o_d
    tl.store(out + p_out, narrow(acc, out.dtype.element_ty), mask=o_d < D)


@triton.jit(do_not_specialize=["rows", "tokens"])
def weighted_sum_gradients(
    weights, v, grad_out, grad_weights, grad_v, offsets, rows, tokens,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of some (token, head) pairs of one row; zero on the tail."""
    row, first, count, tile = find(tl.program_id(0), offsets, rows, tokens, HEADS, BLOCK)
    if tile * BLOCK >= count * HEADS:
        return
    o_r = tile * BLOCK + tl.arange(0, BLOCK)
    n = o_r // HEADS
    head = (o_r % HEADS).to(tl.int64)
    m_out = n < count  # [BLOCK]
    m_in = n < tl.where(row < rows, count, 0)
    b_w = tl.load(weights.pointer + (first + n) * weights.row + head, mask=m_in, other=0.0).to(tl.float32)
    p_pair = (first + n) * HEADS + head
    acc = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        m_d = (o_d < D)[None, :]
        p_grad = row.to(tl.int64) * grad_out.token + head[:, None] * grad_out.head + o_d[None, :]
        b_grad = tl.load(grad_out.pointer + p_grad, mask=m_in[:, None] & m_d, other=0.0).to(tl.float32)
        p_v = (first + n)[:, None] * v.token + head[:, None] * v.head + o_d[None, :]
        b_v = tl.load(v.pointer + p_v, mask=m_in[:, None] & m_d, other=0.0).to(tl.float32)
        acc += tl.sum(b_v * b_grad, 1)
        b_grad_v = narrow(b_w[:, None] * b_grad, grad_v.dtype.element_ty)
        tl.store(grad_v + p_pair[:, None] * D + o_d[None, :], b_grad_v, mask=m_out[:, None] & m_d)
    tl.store(grad_weights + p_pair, narrow(acc, grad_weights.dtype.element_ty), mask=m_out)


def _operand(x: Tensor) -> KeyOperand:
    return KeyOperand(x, x.stride(0), x.stride(1))


def _blocks(channels: int) -> Tiles:
    """Tokens (or pairs of token and head) and channels of a step."""
    wide = min(_MOST_CHANNELS, padded(channels))
    return Tiles(_TILE_NUMBERS // wide, wide, 4, 1)


def forward(call: WeightedSumCall) -> Tensor:
    """The output `[B, H, D]`."""
    weights, v, offsets = readable(call.weights), readable(call.v), readable(call.offsets)
    out = v.new_empty(call.out_shape())
    rows, heads, channels = out.shape
    tiles = _blocks(channels)
    if out.numel():
        _run.start(
            weighted_sums, rows * heads * -(-channels // tiles.keys),
            Table(weights, weights.stride(0)), _operand(v), out, offsets, rows, v.shape[0],
            HEADS=heads, D=channels, BLOCK_T=tiles.queries, BLOCK_D=tiles.keys, lead=v, tiles=tiles,
        )  # fmt: skip
    return out


def backward(call: WeightedSumCall, grad_out: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `weights` and `v`."""
    weights, v, offsets, grad = readable(call.weights), readable(call.v), readable(call.offsets), readable(grad_out)
    grad_weights, grad_v = weights.new_empty(weights.shape), v.new_empty(v.shape)
    (tokens, heads, channels), rows = v.shape, offsets.shape[0] - 1
    tiles = _blocks(channels)
    if grad_weights.numel():
        _run.start(
            weighted_sum_gradients, slots(tokens, rows, heads, tiles.queries),
            Table(weights, weights.stride(0)), _operand(v), _operand(grad), grad_weights, grad_v, offsets,
            rows, tokens,
            HEADS=heads, D=channels, BLOCK=tiles.queries, BLOCK_D=tiles.keys, lead=v, tiles=tiles,
        )  # fmt: skip
    return grad_weights, grad_v
