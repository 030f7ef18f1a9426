"""Rotary embedding of packed tokens, for keys that are rotated once and read often."""

from __future__ import annotations

from torch import Tensor

from interformer_kernels import _checks as checks
from interformer_kernels import reference
from interformer_kernels._calls import RotaryCall
from interformer_kernels.ops._public import PublicOp
from interformer_kernels.ops._registered import RegisteredOp
from interformer_kernels.ops._sharding import over_shards
from interformer_kernels.ops._spec import OpSpec


def _validate(op: PublicOp, call: RotaryCall) -> None:
    checks.check_offsets_content(op.name, "offsets", call.offsets, call.x.shape[0])
    if call.positions is None:
        checks.check_rows_fit_tables(op.name, "offsets", call.offsets, call.cos.shape[0])
    else:
        checks.check_positions_content(op.name, "positions", call.positions, call.offsets, call.cos.shape[0])


def _flops(call: RotaryCall) -> int:
    tokens, heads, _ = call.x.shape
    return int(tokens * heads * call.cos.shape[1] * 6)  # four products and two sums a pair of channels


ROTARY = OpSpec(
    "apply_rotary",
    RotaryCall,
    "T H D",
    reference=reference.apply_rotary,
    validate=_validate,
    flops=_flops,
    backward_over_forward=1.0,
    residual=False,
)
OP = PublicOp("apply_rotary", ROTARY)
_registered = RegisteredOp(ROTARY)


@over_shards(OP)
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
    call, _ = OP.checked(RotaryCall(x, offsets, x, x, positions, interleaved))  # the tables need x's width: below
    cos, sin = checks.check_rope(OP.name, rope, call.x.shape[2], call.x.device)
    call = call._replace(cos=cos, sin=sin)
    if positions is not None:
        axes = checks.Axes(OP.name, T=call.x.shape[0])
        axes.bind("positions", checks.check_index(OP.name, "positions", positions, call.x.device), ("T",))
    out: Tensor = _registered(OP, call, None, backend)
    return out
