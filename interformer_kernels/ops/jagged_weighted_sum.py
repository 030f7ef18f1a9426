"""Sums of each row's values with weights that no product of queries and keys makes."""

from __future__ import annotations

from torch import Tensor

from interformer_kernels import _checks as checks
from interformer_kernels import reference
from interformer_kernels._calls import WeightedSumCall
from interformer_kernels.ops._public import PublicOp
from interformer_kernels.ops._registered import RegisteredOp
from interformer_kernels.ops._sharding import over_shards
from interformer_kernels.ops._spec import OpSpec, with_heads


def _validate(op: PublicOp, call: WeightedSumCall) -> None:
    checks.check_offsets_content(op.name, "offsets", call.offsets, call.v.shape[0])


def _flops(call: WeightedSumCall) -> int:
    tokens, heads, channels = call.v.shape
    return int(2 * tokens * heads * channels)


WEIGHTED_SUM = OpSpec(
    "jagged_weighted_sum",
    WeightedSumCall,
    "B H D",
    reference=reference.jagged_weighted_sum,
    validate=_validate,
    flops=_flops,
    backward_over_forward=2.0,
    residual=False,
)
OP = PublicOp("jagged_weighted_sum", WEIGHTED_SUM)
_registered = RegisteredOp(WEIGHTED_SUM)


@over_shards(OP)
def jagged_weighted_sum(weights: Tensor, v: Tensor, offsets: Tensor, *, backend: str | None = None) -> Tensor:
    r"""Sum the values of each row's tokens, each times its weight, head by head.

    .. math:: y_{bh} = \sum_{t \in \text{row } b} w_{th} v_{th}

    For one row this is, in PyTorch::

        y = (weights[start:end, :, None] * v[start:end]).sum(0)

    With ``T`` packed tokens, ``B`` rows, ``H`` heads of ``D`` channels:

    Args:
        weights: ``[T, H]``, or ``[T]`` where ``v`` has no heads; of any sign, for nothing is normalised.
        v: values ``[T, H, D]``, or ``[T, D]`` with weights ``[T]``. One weight for all heads is one head of as many
            channels: ``v.flatten(1)``.
        offsets: ``[B+1]`` int32 or int64: row ``b`` is ``v[offsets[b]:offsets[b+1]]``. Tokens from ``offsets[B]`` on
            belong to no row: they are not read, and their gradients are zero.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; None takes the fastest that can serve.

    Returns:
        ``[B, H, D]``, or ``[B, D]`` without heads, in the inputs' dtype; zero for empty rows.

    Shapes and dtypes: float32, bfloat16, float16 (float64 on the reference and cpu backends); both floating tensors
    share one dtype and device, or are cast to the autocast dtype under ``torch.autocast``. ``B == 0`` and ``T == 0``
    are ordinary inputs.

    DTensors ``[T, H]`` and ``[T, H, D]`` sharded over heads or rows are computed part by part, and nothing is sent: see
    ``ops/_dtensor.py``.

    Raises:
        TypeError: an argument is of the wrong kind or dtype.
        ValueError: a shape, value, device or (on CPU; elsewhere with ``set_validation("full")``) an offset is wrong.
        RuntimeError: the named backend cannot serve the call.

    Source: Deep Interest Network (Zhou et al., 2018), equation 3.
    """
    wide, is_flat = with_heads(weights, 1)
    call, _ = OP.checked(WeightedSumCall(wide, with_heads(v, 2)[0] if is_flat else v, offsets))
    out: Tensor = _registered(OP, call, None, backend)
    return out.squeeze(1) if is_flat else out
