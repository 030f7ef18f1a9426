# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs
"""Rotary embedding of packed tokens in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from interformer_kernels._calls import RotaryCall
from interformer_kernels._launch.tensors import readable
from interformer_kernels._triton import _run
from interformer_kernels._triton._arguments import KeyOperand, Rope
from interformer_kernels._triton._rope import columns, rotate
from interformer_kernels._triton._rows import find, slots
from interformer_kernels._triton._tiles import Tiles, padded

_TILE_NUMBERS = 4096  # of a program


@triton.jit(do_not_specialize=["rows", "tokens"])
def rotate_rows(
    x, offsets, rope, out, rows, tokens,
    HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    BACKWARDS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Some (token, head) pairs of one row, the first `2 * HALF` channels rotated; zero on the tail."""
    row, first, count, tile = find(tl.program_id(0), offsets, rows, tokens, HEADS, BLOCK)
    if tile * BLOCK >= count * HEADS:
        return
    o_r = tile * BLOCK + tl.arange(0, BLOCK)
    n = o_r // HEADS
    head = (o_r % HEADS).to(tl.int64)
    o_d = columns(BLOCK_D, HALF, INTERLEAVED)
    m_in = n < tl.where(row < rows, count, 0)  # [BLOCK]
    p_x = (first + n) * x.token + head * x.head
    b_x = tl.load(x.pointer + p_x[:, None] + o_d, mask=m_in[:, None] & (o_d < D), other=0.0)
    b_x = rotate(b_x, rope, rope.positions_k, first + n, n, m_in, BLOCK_D, HALF, INTERLEAVED, BACKWARDS)
    p_out = ((first + n) * HEADS + head) * D
    tl.store(out + p_out[:, None] + o_d, b_x, mask=(n < count)[:, None] & (o_d < D))


def rope_operand(cos: Tensor, sin: Tensor, positions_q: Tensor | None, positions_k: Tensor | None) -> Rope:
    """Tables and positions as kernels read them: rows of 4n numbers begin at multiples of four numbers."""
    cos, sin = readable(cos), readable(sin)
    if cos.stride(0) != sin.stride(0) or (cos.stride(0) % 4 and cos.shape[1] % 4 == 0):
        cos, sin = cos.contiguous(), sin.contiguous()
    return Rope(cos, sin, cos.stride(0), cos.shape[0], readable(positions_q), readable(positions_k))


def rotated(
    x: Tensor, offsets: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, backwards: bool
) -> Tensor:
    """`x [T, H, D]` rotated by each token's position, or rotated back; zero on the tail."""
    out = x.new_empty(x.shape)
    tokens, heads, channels = x.shape
    x, offsets, rows = readable(x), readable(offsets), offsets.shape[0] - 1
    wide = padded(channels)
    block = max(1, _TILE_NUMBERS // wide)
    if tokens:
        _run.start(
            rotate_rows, slots(tokens, rows, heads, block),
            KeyOperand(x, x.stride(0), x.stride(1)), offsets,
            rope_operand(cos, sin, None, positions), out, rows, tokens,
            HEADS=heads, D=channels, HALF=cos.shape[1], INTERLEAVED=interleaved,
            BACKWARDS=backwards, BLOCK=block, BLOCK_D=wide, lead=x, tiles=Tiles(block, wide, 8 if wide > 128 else 4, 1),
        )  # fmt: skip
    return out


def forward(call: RotaryCall) -> Tensor:
    """The output `[T, H, D]`."""
    return rotated(call.x, call.offsets, call.cos, call.sin, call.positions, call.interleaved, backwards=False)


def backward(call: RotaryCall, grad_out: Tensor) -> Tensor:
    """The gradient of `x`: the output's, rotated back."""
    return rotated(grad_out, call.offsets, call.cos, call.sin, call.positions, call.interleaved, backwards=True)
