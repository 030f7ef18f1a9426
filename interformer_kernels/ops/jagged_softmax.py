"""Softmax along the tokens of each row, for scores that no product of queries and keys makes."""

from __future__ import annotations

from torch import Tensor

from interformer_kernels import _checks as checks
from interformer_kernels import reference
from interformer_kernels._calls import SoftmaxCall
from interformer_kernels.ops._public import PublicOp
from interformer_kernels.ops._registered import RegisteredOp
from interformer_kernels.ops._sharding import over_shards
from interformer_kernels.ops._spec import OpSpec, with_heads


def _validate(op: PublicOp, call: SoftmaxCall) -> None:
    checks.check_offsets_content(op.name, "offsets", call.offsets, call.scores.shape[0])


def _flops(call: SoftmaxCall) -> int:
    return int(4 * call.scores.shape[0] * call.scores.shape[1])  # difference, exponential, sum and product


SOFTMAX = OpSpec(
    "jagged_softmax",
    SoftmaxCall,
    "T H",
    reference=reference.jagged_softmax,
    validate=_validate,
    flops=_flops,
    backward_over_forward=2.0,
    residual=False,
)
OP = PublicOp("jagged_softmax", SOFTMAX)
_registered = RegisteredOp(SOFTMAX)


@over_shards(OP)
def jagged_softmax(scores: Tensor, offsets: Tensor, *, backend: str | None = None) -> Tensor:
    r"""Normalise the scores of each row's tokens, head by head.

    .. math:: p_{th} = \frac{\exp(s_{th})}{\sum_{u} \exp(s_{uh})}, \qquad u \text{ over the tokens of the row of } t

    For one row this is, in PyTorch::

        p = torch.softmax(scores[start:end], 0)

    With ``T`` packed tokens, ``B`` rows, ``H`` heads:

    Args:
        scores: ``[T, H]``, or ``[T]`` for one head; float32, bfloat16 or float16 (float64 on the reference and cpu
            backends). A score of ``-inf`` hides its token: its weight and its gradient are zero. Where a row has no
            other scores under a head, all weights and gradients there are zero, as those of attention whose keys are
            all masked.
        offsets: ``[B+1]`` int32 or int64: row ``b`` is ``scores[offsets[b]:offsets[b+1]]``. Tokens from ``offsets[B]``
            on belong to no row: they are not read, their outputs and gradients are zero.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; None takes the fastest that can serve.

    Returns:
        The shape and dtype of ``scores``; ``T == 0``, ``B == 0`` and empty rows are ordinary inputs. A NaN or ``inf``
        makes its own row NaN under its own head, as in PyTorch.

    DTensors ``[T, H]`` sharded over heads or rows are computed part by part, and nothing is sent: see
    ``ops/_dtensor.py``.

    Raises:
        TypeError: an argument is of the wrong kind or dtype.
        ValueError: a shape, value, device or (on CPU; elsewhere with ``set_validation("full")``) an offset is wrong.
        RuntimeError: the named backend cannot serve the call.

    Source: Deep Interest Network (Zhou et al., 2018), section 4.3, with the normalisation that the paper leaves out.
    """
    wide, is_flat = with_heads(scores, 1)
    call, _ = OP.checked(SoftmaxCall(wide, offsets))
    out: Tensor = _registered(OP, call, None, backend)
    return out.squeeze(1) if is_flat else out
