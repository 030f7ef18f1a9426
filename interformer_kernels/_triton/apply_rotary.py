# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs
"""Rotary embedding of packed tokens in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from interformer_kernels._calls import RotaryCall
from interformer_kernels._launch.tensors import readable
from interformer_kernels._triton import _run
from interformer_kernels._triton._arguments import KeyOperand, Table
from interformer_kernels._triton._maps import narrow
from interformer_kernels._triton._rows import find, slots
from interformer_kernels._triton._tiles import Tiles, padded

_TILE_NUMBERS = 4096  # of a program


@triton.jit(do_not_specialize=["rows", "tokens", "table_rows"])
def rotate_rows(
    x, offsets, cos, sin, positions, out, rows, tokens, table_rows,
    HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    BACKWARDS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Some (token, head) pairs of one row, the first `2 * HALF` channels rotated; zero on the tail."""
    row, first, count, tile = find(tl.program_id(0), offsets, rows, tokens, HEADS, BLOCK)
    if tile * BLOCK >= count * HEADS:
        return
    o_r = tile * BLOCK + tl.arange(0, BLOCK)
    o_d = tl.arange(0, BLOCK_D)
    n = o_r // HEADS
    head = (o_r % HEADS).to(tl.int64)
    m_out = (n < count)[:, None] & (o_d < D)[None, :]  # [BLOCK, BLOCK_D]
    loaded = tl.where(row < rows, count, 0)
    m_in = (n < loaded)[:, None] & (o_d < D)[None, :]
    if positions is not None:
        place = tl.load(positions + first + n, mask=n < loaded, other=0).to(tl.int64)
    else:
        place = n.to(tl.int64)
    place = tl.minimum(tl.maximum(place, 0), table_rows - 1)[:, None]
    # The other channel of a pair, and the pair's angle.
    if INTERLEAVED:
        other = o_d ^ 1
        angle = o_d // 2
        second = o_d % 2 == 1
    else:
        other = tl.where(o_d < HALF, o_d + HALF, o_d - HALF)
        angle = o_d % HALF
        second = o_d >= HALF
    m_rotated = m_in & (o_d < 2 * HALF)[None, :]
    b_cos = tl.load(cos.pointer + place * cos.row + angle, mask=m_rotated, other=1.0)
    b_sin = tl.load(sin.pointer + place * sin.row + angle, mask=m_rotated, other=0.0)
    p_x = ((first + n) * x.token + head * x.head)[:, None]
    b_x = tl.load(x.pointer + p_x + o_d, mask=m_in, other=0.0)
    b_other = tl.load(x.pointer + p_x + other, mask=m_rotated, other=0.0).to(tl.float32)
    if BACKWARDS:
        b_sin = -b_sin
    b_rotated = b_x.to(tl.float32) * b_cos + tl.where(second[None, :], b_other, -b_other) * b_sin
    # Channels that are not rotated keep their bits.
    b_out = tl.where(m_rotated, narrow(b_rotated, b_x.dtype), b_x)
    tl.store(out + ((first + n) * HEADS + head)[:, None] * D + o_d, b_out, mask=m_out)


def rotated(
    x: Tensor, offsets: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, backwards: bool
) -> Tensor:
    """`x [T, H, D]` rotated by each token's position, or rotated back; zero on the tail."""
    out = x.new_empty(x.shape)
    tokens, heads, channels = x.shape
    x, cos, sin, rows = readable(x), readable(cos), readable(sin), offsets.shape[0] - 1
    offsets, positions = readable(offsets), readable(positions)
    wide = padded(channels)
    block = max(1, _TILE_NUMBERS // wide)
    if tokens:
        _run.start(
            rotate_rows, slots(tokens, rows, heads, block),
            KeyOperand(x, x.stride(0), x.stride(1)), offsets, Table(cos, cos.stride(0)), Table(sin, sin.stride(0)),
            positions, out, rows, tokens, cos.shape[0],
            HEADS=heads, D=channels, HALF=cos.shape[1], INTERLEAVED=interleaved,
            BACKWARDS=backwards, BLOCK=block, BLOCK_D=wide, lead=x, tiles=Tiles(block, wide, 4, 1),
        )  # fmt: skip
    return out


def forward(call: RotaryCall) -> Tensor:
    """The output `[T, H, D]`."""
    return rotated(call.x, call.offsets, call.cos, call.sin, call.positions, call.interleaved, backwards=False)


def backward(call: RotaryCall, grad_out: Tensor) -> Tensor:
    """The gradient of `x`: the output's, rotated back."""
    return rotated(grad_out, call.offsets, call.cos, call.sin, call.positions, call.interleaved, backwards=True)
