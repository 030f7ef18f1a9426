# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs
"""Rotary embedding of tiles in registers: `apply_rotary`, queries and keys of attention as they are loaded, and their
gradients as they are stored.

Both channels of a pair must be in one thread. So a pair is two columns side by side of the tile (2c, 2c+1) where
channels are interleaved, else the columns c and c + BLOCK_D/2: `columns` says which channel a column holds. Products
of queries and keys sum over channels in the order of columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from interformer_kernels._triton._maps import narrow


@triton.jit
def columns(BLOCK_D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The channel that each column of a tile holds; those behind the rotated `2 * HALF` fill up both halves."""
    o_d = tl.arange(0, BLOCK_D)
    if HALF > 0 and not INTERLEAVED and 2 * HALF < BLOCK_D:
        MIDDLE: tl.constexpr = BLOCK_D // 2
        o_c = o_d % MIDDLE
        o_d = o_c + tl.where(o_c < HALF, tl.where(o_d < MIDDLE, 0, HALF), tl.where(o_d < MIDDLE, HALF, MIDDLE))
        # So many columns side by side hold channels side by side, which are read at once.
        RUN: tl.constexpr = HALF & -HALF
        o_d = tl.max_contiguous(tl.multiple_of(o_d, RUN), RUN)
    return o_d


@triton.jit
def _angles(table, p_row, mask, BLOCK_D: tl.constexpr, HALF: tl.constexpr):
    """Rows of a table, an angle for each pair of columns; zero where the mask says no, and for pairs that stay."""
    o_c = tl.arange(0, BLOCK_D // 2)
    return tl.load(table + p_row[:, None] + o_c, mask=mask[:, None] & (o_c < HALF), other=0.0)


@triton.jit
def rotate(
    b_x, rope, positions, token, n, mask,
    BLOCK_D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BACKWARDS: tl.constexpr,
):  # fmt: skip
    """A tile `[TOKENS, BLOCK_D]` by `columns`, each token rotated by its position, or back, and rounded to its dtype.

    `token` is its index in the batch, `n` in its row; rows of the tile where the mask says no are zero.
    """
    place = n
    if positions is not None:
        place = tl.maximum(tl.load(positions + token, mask=mask, other=0), 0)
    p_row = tl.minimum(place, rope.rows - 1).to(tl.int64) * rope.row
    if HALF % 4 == 0:
        p_row = tl.multiple_of(p_row, 4)  # `apply_rotary.rope_operand` sees to that
    b_cos = _angles(rope.cos, p_row, mask, BLOCK_D, HALF)
    b_sin = _angles(rope.sin, p_row, mask, BLOCK_D, HALF)
    if BACKWARDS:
        b_sin = -b_sin
    TOKENS: tl.constexpr = b_x.shape[0]
    if INTERLEAVED:
        first, second = tl.split(tl.reshape(b_x, [TOKENS, BLOCK_D // 2, 2]))
    else:
        first, second = tl.split(tl.permute(tl.reshape(b_x, [TOKENS, 2, BLOCK_D // 2]), [0, 2, 1]))
    a = first.to(tl.float32)
    b = second.to(tl.float32)
    # As explicit fma: which product of a sum is rounded must not be left to the compiler, for all kernels of a call
    # must see the same numbers.
    b_first = narrow(tl.fma(a, b_cos, -(b * b_sin)), b_x.dtype)
    b_second = narrow(tl.fma(b, b_cos, a * b_sin), b_x.dtype)
    if 2 * HALF < BLOCK_D:
        # Channels that are not rotated keep their bits.
        rotates = (tl.arange(0, BLOCK_D // 2) < HALF)[None, :]
        b_first = tl.where(rotates, b_first, first)
        b_second = tl.where(rotates, b_second, second)
    pairs = tl.join(b_first, b_second)
    if not INTERLEAVED:
        pairs = tl.permute(pairs, [0, 2, 1])
    return tl.reshape(pairs, [TOKENS, BLOCK_D])


@triton.jit
def _rotate_row(x, rope, positions, first, i, mask, SHAPE: tl.constexpr, BACKWARDS: tl.constexpr):
    """`rotate` of the tokens `i` of a row whose first is `first`, as a kernel's shape has it."""
    return rotate(x, rope, positions, first + i, i, mask, SHAPE.block_d, SHAPE.half, SHAPE.interleaved, BACKWARDS)


@triton.jit
def rotate_q(b_q, rope, first, n, mask, SHAPE: tl.constexpr, BACKWARDS: tl.constexpr):
    """Queries rotated as they are loaded, or gradients of them rotated back."""
    if SHAPE.rotate_q or (BACKWARDS and SHAPE.half):
        b_q = _rotate_row(b_q, rope, rope.positions_q, first, n, mask, SHAPE, BACKWARDS)
    return b_q


@triton.jit
def rotate_k(b_k, rope, first, j, mask, SHAPE: tl.constexpr, BACKWARDS: tl.constexpr):
    """The same for keys."""
    if SHAPE.rotate_k or (BACKWARDS and SHAPE.half):
        b_k = _rotate_row(b_k, rope, rope.positions_k, first, j, mask, SHAPE, BACKWARDS)
    return b_k
