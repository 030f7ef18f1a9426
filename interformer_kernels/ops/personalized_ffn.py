"""Personalised feed-forward: each row of a jagged batch has its own weight matrix."""

from __future__ import annotations

from torch import Tensor

from interformer_kernels import _checks as checks
from interformer_kernels import reference
from interformer_kernels._calls import FfnCall
from interformer_kernels.ops._public import PublicOp
from interformer_kernels.ops._registered import RegisteredOp
from interformer_kernels.ops._sharding import over_shards
from interformer_kernels.ops._spec import OpSpec


def _validate(op: PublicOp, call: FfnCall) -> None:
    checks.check_offsets_content(op.name, "offsets", call.offsets, call.x.shape[0])


def _flops(call: FfnCall) -> int:
    return int(2 * call.x.shape[0] * call.weight.shape[1] * call.weight.shape[2])


FFN = OpSpec(
    "personalized_ffn",
    FfnCall,
    "T F",
    reference=reference.personalized_ffn,
    validate=_validate,
    flops=_flops,
    backward_over_forward=2.0,
)
OP = PublicOp("personalized_ffn", FFN)
_registered = RegisteredOp(FFN)


@over_shards(OP)
def personalized_ffn(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    *,
    bias: Tensor | None = None,
    activation: str = "identity",
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Multiply every token by the weight matrix of its row.

    .. math:: y_t = act(x_t W_b + bias_b) \;(+\; residual_t), \qquad b = \text{row of token } t

    For one row this is, in PyTorch::

        y = act(x[start:end] @ weight[b] + bias[b])
        y = y if residual is None else y + residual[start:end]

    With ``T`` packed tokens, ``B`` rows, ``E`` input and ``F`` output channels:

    Args:
        x: tokens ``[T, E]``.
        weight: ``[B, E, F]``, one matrix a row.
        offsets: ``[B+1]`` int32 or int64: row ``b`` is ``x[offsets[b]:offsets[b+1]]``. Tokens from ``offsets[B]`` on
            belong to no row: they are not read, their outputs and gradients are zero.
        bias: ``[B, F]``.
        activation: ``"identity"``, ``"relu"``, ``"silu"`` or ``"gelu"`` (by erf).
        residual: added to the result; anything that broadcasts to ``[T, F]``.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; None takes the fastest that can serve.

    Returns:
        ``[T, F]`` in the inputs' dtype. The weight of an empty row gets a zero gradient.

    Shapes and dtypes: float32, bfloat16, float16 (float64 on the reference and cpu backends); all floating tensors
    share one dtype and device, or are cast to the autocast dtype under ``torch.autocast``. ``B == 0``, ``T == 0`` and
    empty rows are ordinary inputs.

    DTensors sharded over rows, features or channels are computed part by part, and nothing is sent: see
    ``ops/_dtensor.py``.

    Raises:
        TypeError: an argument is of the wrong kind or dtype.
        ValueError: a shape, value, device or (on CPU; elsewhere with ``set_validation("full")``) an offset is wrong.
        RuntimeError: the named backend cannot serve the call.

    Source: InterFormer (arXiv 2411.09852), equation 8.
    """
    call, residual = OP.checked(FfnCall(x, weight, offsets, bias, activation), residual)
    out: Tensor = _registered(OP, call, residual, backend)
    return out
