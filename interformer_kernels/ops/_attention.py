"""What the ops of the attention family share: output allocation, what the backward keeps, counting of visible pairs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from interformer_kernels import _backend
from interformer_kernels.ops._registered import Bound, exact_dtype


def empty_outputs(
    like: Tensor, shape: tuple[int, ...], score: str, keep_attn_out: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised `(out, lse, attn_out)`; what is not asked for is an empty tensor.

    `attn_out` is A before gate and residual, in the dtype of accumulation: rounded to 16 bits it could overflow where
    the output does not, and sums over many tokens would show the rounding.
    """
    exact = exact_dtype(like.dtype)
    lse_shape = shape[:-1] if score == "softmax" else (0,)
    out = like.new_empty(shape)
    return out, like.new_empty(lse_shape, dtype=exact), like.new_empty(shape if keep_attn_out else (0,), dtype=exact)


def backward_reads_attn_out(
    op: str, backend: str, k: Tensor, v: Tensor | None, gate: Tensor | None, score: str
) -> bool:
    """Whether a call's backward needs A itself: for a gate's gradient, or for the softmax's `delta = <dA, A>`.

    Kernels that have all weights of a query at hand find delta from those, or make a sum over them first.
    """
    if gate is not None:
        return True
    if score != "softmax" or k.dtype not in (torch.bfloat16, torch.float16):
        return False
    channels = max(k.shape[-1], 0 if v is None else v.shape[-1])
    return (backend or _backend.choose(op, k.device.type, k.dtype, channels)) == "triton"


def keeps_attn_out(op: str, bound: Bound) -> bool:
    """`backward_reads_attn_out` of a call by its arguments' names."""
    return backward_reads_attn_out(op, bound["backend"], bound["k"], bound["v"], bound["gate"], bound["score"])


def empty_gradients(
    queries: Tensor, k: Tensor, v: Tensor | None, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised contiguous gradients of the inputs; an empty tensor for an input that was not given."""

    def empty(x: Tensor | None) -> Tensor:
        return k.new_empty((0,) if x is None else x.shape)

    return empty(queries), empty(k), empty(v), empty(gate)


def row_pairs(kv_offsets: Tensor, total_keys: int, queries: int | Tensor, total_queries: int) -> int:
    """Query-key pairs over all rows, masks not counted; `queries` is each row's number, or their offsets.

    Without real offsets (fake tensors) every row is taken to have the mean length.
    """
    rows = max(kv_offsets.shape[0] - 1, 1)
    if isinstance(kv_offsets, FakeTensor) or kv_offsets.is_meta:
        return int(total_keys) * int(total_queries) // rows
    keys = kv_offsets.diff()
    return int((keys * (queries.diff() if isinstance(queries, Tensor) else queries)).sum())


def attention_flops(pairs: int, q_heads: int, head_size: int, value_size: int) -> int:
    """Two multiply-adds of the scores and of the weighted sum, as `torch.utils.flop_counter` counts SDPA."""
    return 2 * pairs * q_heads * (head_size + value_size)


BACKWARD_OVER_FORWARD = 2.5  # five matrix products against two: scores again, dV, dP, dQ, dK
