"""Rotary embedding of packed tokens, for keys that are rotated once and read often."""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from interformer_kernels import _checks as checks
from interformer_kernels import reference
from interformer_kernels.ops._registered import Bound, RegisteredOp, autocast
from interformer_kernels.ops._sharding import over_shards

OP = "apply_rotary"


def forward_fake(
    x: Tensor, offsets: Tensor, cos: Tensor, sin: Tensor, positions: Optional[Tensor], interleaved: bool, backend: str
) -> Tensor:
    return x.new_empty(x.shape)


def backward_fake(
    grad_out: Tensor,
    x: Tensor,
    offsets: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Optional[Tensor],
    interleaved: bool,
    backend: str,
) -> Tensor:
    return x.new_empty(x.shape)


def _validate(bound: Bound) -> None:
    offsets, table_rows = bound["offsets"], bound["cos"].shape[0]
    checks.check_offsets_content(OP, "offsets", offsets, bound["x"].shape[0])
    if bound["positions"] is None:
        checks.check_rows_fit_tables(OP, "offsets", offsets, table_rows)
    else:
        checks.check_positions_content(OP, "positions", bound["positions"], offsets, table_rows)


def _flops(bound: Bound) -> int:
    tokens, heads, _ = bound["x"].shape
    return int(tokens * heads * bound["cos"].shape[1] * 6)  # four products and two sums a pair of channels


_op = RegisteredOp(
    OP,
    forward_fake,
    backward_fake,
    reference.apply_rotary,
    differentiable=("x",),
    validate=_validate,
    rows_mask=lambda bound: reference.inside_rows(bound["offsets"], bound["x"].shape[0]),
    flops=_flops,
    backward_over_forward=1.0,
)


@over_shards("T H D", x="T H D")
def apply_rotary(
    x: Tensor,
    offsets: Tensor,
    rope: tuple[Tensor, Tensor],
    *,
    interleaved: bool = False,
    positions: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Rotate pairs of channels of every token by an angle that depends on its position in the row.

    .. math:: (a, b) \mapsto (a \cos\theta_p - b \sin\theta_p,\; a \sin\theta_p + b \cos\theta_p)

    For one row this is, in PyTorch (pairs ``(c, c + R/2)``)::

        a, b = x[start:end, :, :R // 2], x[start:end, :, R // 2 : R]
        c, s = cos[:end - start, None], sin[:end - start, None]
        y = torch.cat((a * c - b * s, a * s + b * c, x[start:end, :, R:]), -1)

    With ``T`` packed tokens, ``B`` rows, ``H`` heads of ``D`` channels, ``R <= D`` rotated ones, ``P`` table rows:

    Args:
        x: ``[T, H, D]``, float32, bfloat16 or float16 (float64 on the reference and cpu backends).
        offsets: ``[B+1]`` int32 or int64: row ``b`` is ``x[offsets[b]:offsets[b+1]]``. Tokens from ``offsets[B]`` on
            belong to no row: their outputs and gradients are zero.
        rope: the tables ``(cos, sin)``, each float32 ``[P, R/2]``; they get no gradient.
        interleaved: channel pairs are ``(2c, 2c+1)`` instead of ``(c, c + R/2)``.
        positions: int ``[T]``; None is the index in the row. Positions outside ``[0, P)`` are an error where contents
            are validated, and clamped elsewhere.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; None takes the fastest that can serve.

    Returns:
        ``[T, H, D]`` in x's dtype; ``T == 0`` and empty rows are ordinary inputs.

    DTensors sharded over heads or rows are computed part by part, and nothing is sent: see ``ops/_dtensor.py``.

    Raises:
        TypeError: an argument is of the wrong kind or dtype.
        ValueError: a shape, value, device or (on CPU; elsewhere with ``set_validation("full")``) an offset or position
            is wrong.
        RuntimeError: the named backend cannot serve the call.

    Source: RoFormer (Su et al., 2021), section 3.4.2.
    """
    (x,) = autocast(x)
    checks.check_floats(OP, "x", {"x": x})
    axes = checks.Axes(OP)
    axes.bind("x", x, ("T", "H", "D"))
    checks.check_offsets(OP, "offsets", offsets, x.device)
    cos, sin = checks.check_rope(OP, rope, axes["D"], x.device)
    interleaved = checks.check_bool(OP, "interleaved", interleaved)
    if positions is not None:
        axes.bind("positions", checks.check_index(OP, "positions", positions, x.device), ("T",))
    out = _op(x, offsets, cos, sin, positions, interleaved, checks.backend_name(OP, backend))
    assert isinstance(out, Tensor)
    return out
