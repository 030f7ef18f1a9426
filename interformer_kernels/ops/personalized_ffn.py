"""Personalised feed-forward: each row of a jagged batch has its own weight matrix."""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from interformer_kernels import _checks as checks
from interformer_kernels import reference
from interformer_kernels.ops._registered import Bound, RegisteredOp, autocast
from interformer_kernels.ops._sharding import over_shards

OP = "personalized_ffn"


def forward_fake(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Optional[Tensor],
    residual: Optional[Tensor],
    activation: str,
    backend: str,
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


def backward_fake(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Optional[Tensor],
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_bias = x.new_empty((0,) if bias is None else bias.shape)
    return x.new_empty(x.shape), x.new_empty(weight.shape), grad_bias


def _validate(bound: Bound) -> None:
    checks.check_offsets_content(OP, "offsets", bound["offsets"], bound["x"].shape[0])


def _flops(bound: Bound) -> int:
    return int(2 * bound["x"].shape[0] * bound["weight"].shape[1] * bound["weight"].shape[2])


_op = RegisteredOp(
    OP,
    forward_fake,
    backward_fake,
    reference.personalized_ffn,
    differentiable=("x", "weight", "bias", "residual"),
    validate=_validate,
    rows_mask=lambda bound: reference.inside_rows(bound["offsets"], bound["x"].shape[0]),
    flops=_flops,
    backward_over_forward=2.0,
)


@over_shards("T F", x="T E", weight="B E F", bias="B F")
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
    x, weight, bias, residual = autocast(x, weight, bias, residual)
    checks.check_floats(OP, "x", {"x": x, "weight": weight, "bias": bias, "residual": residual})
    axes = checks.Axes(OP, B=checks.check_offsets(OP, "offsets", offsets, x.device))
    axes.bind("x", x, ("T", "E"))
    axes.bind("weight", weight, ("B", "E", "F"))
    if bias is not None:
        axes.bind("bias", bias, ("B", "F"))
    residual = checks.check_residual(OP, residual, (axes["T"], axes["F"]))
    checks.check_choice(OP, "activation", activation, checks.FFN_ACTIVATIONS)
    out = _op(x, weight, offsets, bias, residual, activation, checks.backend_name(OP, backend))
    assert isinstance(out, Tensor)
    return out
