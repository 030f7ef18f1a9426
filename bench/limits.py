"""The least that a call must compute and move, whatever implementation computes it: FLOPs and bytes.

Only useful FLOPs count: no padding, no masks; a multiply-add is two. The op's module in `ops` has them.

Bytes: the forward reads every input and writes the output, once. The backward reads every input and `grad_out` and
writes every gradient, once (`apply_rotary` rotates `grad_out` back, and does not read x again; the residual's gradient
is `grad_out` itself). Offsets and rotary tables count as inputs. Reuse of cached data between the two passes is not
assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from interformer_bench.ops.table import TABLE
from interformer_bench.workloads import DIFFERENTIABLE, Inputs, Sizes
from torch import Tensor


@dataclass(frozen=True)
class Work:
    """The FLOPs and bytes of a call."""

    flops: int
    bytes: int


def work(op: str, arguments: Inputs, lengths: Sequence[int], sizes: Sizes, direction: str) -> Work:
    """The work of one call with these arguments; `direction` is "forward" or "forward+backward"."""
    forward_flops, backward_flops = flops(op, lengths, sizes)
    read, written = _bytes(op, arguments)
    if direction == "forward":
        return Work(forward_flops, read + written)
    gradients = sum(
        _size(arguments[name]) for name in DIFFERENTIABLE[op] if arguments.get(name) is not None and name != "residual"
    )
    unread = sum(_size(arguments[name]) for name in TABLE[op].unread)
    return Work(forward_flops + backward_flops, 2 * (read + written) + gradients - unread)


def flops(op: str, lengths: Sequence[int], sizes: Sizes) -> tuple[int, int]:
    """The FLOPs of the forward and of the backward alone."""
    return TABLE[op].flops(lengths, sizes)


def _bytes(op: str, arguments: Inputs) -> tuple[int, int]:
    """The bytes of the inputs, and of the output (which is as large as `grad_out`)."""
    inputs = [x for name, x in arguments.items() if name != "grad_out"]
    tensors = [*inputs, *arguments.get("rope", ())]
    return sum(_size(x) for x in tensors if isinstance(x, Tensor)), _size(arguments["grad_out"])


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()
