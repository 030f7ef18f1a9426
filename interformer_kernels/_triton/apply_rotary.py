"""Rotary embedding of packed tokens in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from interformer_kernels._calls import RotaryCall
from interformer_kernels._launch.tensors import readable
from interformer_kernels._triton import _run
from interformer_kernels._triton._maps import narrow
from interformer_kernels._triton._rows import find, slots
from interformer_kernels._triton._tiles import Tiles, padded

_NUMBERS = 4096  # of a program


@triton.jit(do_not_specialize=["rows", "tokens", "table_rows"])
def rotate_rows(
    x, offsets, cos, sin, positions, out, rows, tokens, table_rows, x_token, x_head, cos_row, sin_row,
    HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, POSITIONS: tl.constexpr,
    BACKWARDS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Some (token, head) pairs of one row, the first `2 * HALF` channels turned; zero on the tail."""
    row, first, count, tile = find(tl.program_id(0), offsets, rows, tokens, HEADS, BLOCK)
    if tile * BLOCK >= count * HEADS:
        return
    o_r = tile * BLOCK + tl.arange(0, BLOCK)
    o_d = tl.arange(0, BLOCK_D)
    n = o_r // HEADS
    head = (o_r % HEADS).to(tl.int64)
    m_out = (n < count)[:, None] & (o_d < D)[None, :]  # [BLOCK, BLOCK_D]
    held = tl.where(row < rows, count, 0)
    m_in = (n < held)[:, None] & (o_d < D)[None, :]
    if POSITIONS:
        place = tl.load(positions + first + n, mask=n < held, other=0).to(tl.int64)
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
    m_turned = m_in & (o_d < 2 * HALF)[None, :]
    b_cos = tl.load(cos + place * cos_row + angle, mask=m_turned, other=1.0)
    b_sin = tl.load(sin + place * sin_row + angle, mask=m_turned, other=0.0)
    p_x = ((first + n) * x_token + head * x_head)[:, None]
    b_x = tl.load(x + p_x + o_d, mask=m_in, other=0.0)
    b_other = tl.load(x + p_x + other, mask=m_turned, other=0.0).to(tl.float32)
    if BACKWARDS:
        b_sin = -b_sin
    b_turned = b_x.to(tl.float32) * b_cos + tl.where(second[None, :], b_other, -b_other) * b_sin
    # Channels that do not turn pass as they are, bit by bit.
    b_out = tl.where(m_turned, narrow(b_turned, b_x.dtype), b_x)
    tl.store(out + ((first + n) * HEADS + head)[:, None] * D + o_d, b_out, mask=m_out)


def rotated(
    x: Tensor, offsets: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, backwards: bool
) -> Tensor:
    """`x [T, H, D]` turned by each token's position, or turned back; zero on the tail."""
    out = x.new_empty(x.shape)
    tokens, heads, channels = x.shape
    x, cos, sin, rows = readable(x), readable(cos), readable(sin), offsets.shape[0] - 1
    offsets, positions = readable(offsets), readable(positions)
    wide = padded(channels)
    block = max(1, _NUMBERS // wide)
    if tokens:
        _run.start(
            rotate_rows, slots(tokens, rows, heads, block),
            x, offsets, cos, sin, positions, out, rows, tokens, cos.shape[0],
            x.stride(0), x.stride(1), cos.stride(0), sin.stride(0),
            HEADS=heads, D=channels, HALF=cos.shape[1], INTERLEAVED=interleaved, POSITIONS=positions is not None,
            BACKWARDS=backwards, BLOCK=block, BLOCK_D=wide, tiles=Tiles(block, wide, 4, 1),
        )  # fmt: skip
    return out


def forward(call: RotaryCall) -> Tensor:
    """The output `[T, H, D]`."""
    return rotated(call.x, call.offsets, call.cos, call.sin, call.positions, call.interleaved, backwards=False)


def backward(call: RotaryCall, grad_out: Tensor) -> Tensor:
    """The gradient of `x`: the output's, rotated back."""
    return rotated(grad_out, call.offsets, call.cos, call.sin, call.positions, call.interleaved, backwards=True)
