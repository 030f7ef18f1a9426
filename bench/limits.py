"""The least that a call must compute and move, whatever implementation computes it: FLOPs and bytes.

Only useful FLOPs count: no padding, no masks; a multiply-add is two. `L` is the length of a row, `T` the sum of all
`L`.

| op | forward | backward |
|---|---|---|
| jagged_attention | `4 H D sum(L^2)` (scores, weighted sum) | `10 H D sum(L^2)` (scores again, 2 products for each) |
| pma_pooling, gated_cross_attention | `4 M H D T` | `10 M H D T` |
| pma_folded | `4 M H E T` + `2 M H D E (1 + B)` (fold, apply `W_v`) | `10 M H E T` + `4 M H D E (1 + B)` |
| apply_rotary | `3 H D T` (a pair of channels: 4 products, 2 sums) | `3 H D T` |
| personalized_ffn | `2 E F T` | `4 E F T` |

Bytes: the forward reads every input and writes the output, once. The backward reads every input and `grad_out` and
writes every gradient, once (`apply_rotary` rotates `grad_out` back, and does not read x again). Offsets and rotary
tables count as inputs. Reuse of cached data between the two passes is not assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    if op == "apply_rotary":  # x is not read again, and its gradient has the same size
        return Work(forward_flops + backward_flops, 2 * (read + written))
    gradients = sum(
        _size(arguments[name]) for name in DIFFERENTIABLE[op] if arguments.get(name) is not None and name != "residual"
    )
    return Work(forward_flops + backward_flops, 2 * (read + written) + gradients)


def flops(op: str, lengths: Sequence[int], sizes: Sizes) -> tuple[int, int]:
    """The FLOPs of the forward and of the backward alone."""
    tokens, rows = sum(lengths), len(lengths)
    if op == "jagged_attention":
        product = 2 * sizes.heads * sizes.head_size * sum(length * length for length in lengths)
        return 2 * product, 5 * product
    if op == "apply_rotary":
        rotation = 3 * sizes.heads * sizes.head_size * tokens
        return rotation, rotation
    if op == "personalized_ffn":
        product = 2 * sizes.head_size * sizes.width * tokens
        return product, 2 * product
    if op == "pma_folded":
        product = 2 * sizes.queries * sizes.heads * sizes.width * tokens
        projections = 2 * sizes.queries * sizes.heads * sizes.head_size * sizes.width * (1 + rows)
        return 2 * product + projections, 5 * product + 2 * projections
    product = 2 * sizes.queries * sizes.heads * sizes.head_size * tokens
    return 2 * product, 5 * product


def _bytes(op: str, arguments: Inputs) -> tuple[int, int]:
    """The bytes of the inputs, and of the output (which is as large as `grad_out`)."""
    inputs = [x for name, x in arguments.items() if name != "grad_out"]
    tensors = [*inputs, *arguments.get("rope", ())]
    return sum(_size(x) for x in tensors if isinstance(x, Tensor)), _size(arguments["grad_out"])


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()
