"""`pma_pooling` of projected tokens without projecting each token: the projections are folded into seeds and output.

Plain tensor functions without parameters, shared by `nn.PMAPooling`, InterFormer's PMA and the bench. Plain eager calls
on the CPU are one call of the native module; all others are composed of `pma_pooling` and PyTorch's products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from interformer_kernels import _backend
from interformer_kernels import _checks as checks
from interformer_kernels._calls import AttentionCall, FoldedCall, FoldedOutputs
from interformer_kernels.ops import _autograd as autograd
from interformer_kernels.ops._attention import registered
from interformer_kernels.ops.pma_pooling import pma_pooling

# Folding is cheaper while the queries M * H are at most this share of E: measured, see docs/measured-facts.md.
FOLDED_SHARE = 0.25


def folding_wins(num_queries: int, embed_dim: int) -> bool:
    """The cost rule: whether pooling by `num_queries = M * H` is cheaper with folded projections.

    Unfolded, a token of width `W` costs `4 E W` operations of its projections and `4 M E` of attention; folded,
    `4 M H W` of attention over the token itself, and a row `2 M E W` of its values' projection. Long rows would allow a
    larger share, but the rule uses the module's sizes alone, so that a row's bits do not depend on its batch.
    """
    return num_queries <= FOLDED_SHARE * embed_dim


def pool_folded(
    seeds: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
    x: Tensor,
    offsets: Tensor,
    *,
    scale: float,
    backend: str | None = None,
) -> Tensor:
    """`pma_pooling(seeds [M, H, D], x @ key_weight.T, x @ value_weight.T + value_bias, offsets)`: `[B, M, H, D]`.

    The key projection is folded into the seeds and the value projection is applied to the pooled raw tokens, so both
    cost once per row instead of once per token. The weights are `[E, width]`, `value_bias [E]`, `x [T, width]`. A key
    bias needs no argument: it adds the same number to all scores of a query and cancels in the softmax. The value bias
    is added once, to rows that are not empty.
    """
    call = FoldedCall(seeds, key_weight, value_weight, value_bias, x, offsets, scale)
    out = _pool_natively(call, backend)
    return _pool_composed(call, backend) if out is None else out


# ---------------------------------------------------------------- composed of other ops


def _pool_composed(call: FoldedCall, backend: str | None) -> Tensor:
    seeds, x, offsets = call.seeds, call.x, call.offsets
    folded = fold_seeds(seeds, call.key_weight)
    pooled = pma_pooling(folded, x[:, None], None, offsets, scale=call.scale, backend=backend)
    assert isinstance(pooled, Tensor)
    heads = seeds.shape[1:]
    projected = project_pooled(pooled, call.value_weight, heads)
    if call.value_bias is None:
        return projected
    return projected + call.value_bias.to(projected.dtype).view(heads).where(_not_empty(offsets), 0)


def _not_empty(offsets: Tensor) -> Tensor:
    return (offsets.diff() > 0)[:, None, None, None]


def _multipliable(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as PyTorch multiplies them fast: its products of float16 on the CPU take a hundred times as long."""
    if all(x.dtype == torch.float16 and x.device.type == "cpu" for x in tensors):
        return tuple(x.float() for x in tensors)
    return tensors


def fold_seeds(seeds: Tensor, key_weight: Tensor) -> Tensor:
    """Seeds `[M, H, D]` times the key projection `[E, width]`: queries `[M, H, width]` for raw tokens."""
    left, right = _multipliable(seeds, key_weight)
    return torch.einsum("mhd,hdw->mhw", left, right.unflatten(0, seeds.shape[1:])).to(seeds.dtype)


def project_pooled(pooled: Tensor, value_weight: Tensor, heads: Sequence[int]) -> Tensor:
    """Pooled raw tokens `[B, M, H, width]` through the value projection `[E, width]`: `[B, M, *heads = (H, D)]`.

    The same as `einsum("bmhw,hdw->bmhd")`, which asks whether B is 1, so that an exported program would refuse a single
    row. The copy replaces the one that joining the heads would make.
    """
    left, right = _multipliable(pooled, value_weight)
    by_head = torch.bmm(merge_rows(left).transpose(0, 1), right.unflatten(0, heads).transpose(1, 2))  # [H, B*M, D]
    by_row = by_head.transpose(0, 1).to(pooled.dtype).clone(memory_format=torch.contiguous_format)
    return split_rows(by_row, pooled.shape[:2])


def merge_rows(x: Tensor) -> Tensor:
    """`x [B, M, ...]` as `[B*M, ...]`; in a traced program grouped by `m`, an order that `split_rows` undoes.

    `flatten` asks whether B is 1, and a traced program would then refuse a single row; `unbind` with `cat` does not.
    """
    if not torch.compiler.is_compiling():
        return x.flatten(0, 1)
    return torch.cat(x.unbind(1))


def split_rows(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `merge_rows`: `[B*M, ...]` as `[B, M, ...]`, with `shape = (B, M)`."""
    if not torch.compiler.is_compiling():
        return x.view(*shape, *x.shape[1:])
    return torch.stack([x.narrow(0, m * shape[0], shape[0]) for m in range(shape[1])], 1)


# ---------------------------------------------------------------- one call of the native module


def _pool_natively(call: FoldedCall, backend: str | None) -> Tensor | None:
    """The output of a plain eager call on the CPU; None where it is declined, before anything is computed.

    Nothing is refused here: the composed way serves what is declined, or says what is wrong with it.
    """
    if torch.compiler.is_compiling() or backend not in (None, "cpu"):
        return None
    if _backend.native() is None or not (autograd.is_eager() and autograd.are_plain(call[:-1])):
        return None
    inputs = call[:5]
    records = autograd.wants_gradients(inputs)
    outputs = _native_outputs(call, records)
    if outputs is None:
        return None
    _backend.choose("pma_pooling", "cpu", call.x.dtype, call.x.shape[1])  # for its log
    out: Tensor = _Recorded.apply(call, outputs, *inputs) if records else outputs.out  # type: ignore[no-untyped-call]
    return out


def _native_outputs(call: FoldedCall, keep_pooled: bool) -> FoldedOutputs | None:
    seeds, x, offsets = call.seeds, call.x, call.offsets
    if not (x.is_cpu and x.dim() == 2 and seeds.dim() == 3 and offsets.dim() == 1 and len(offsets) > 0):
        return None
    module: Any = _backend.native()
    shape = len(offsets) - 1, *seeds.shape[:2]
    out = x.new_empty((*shape, seeds.shape[2]))
    outputs = FoldedOutputs(out, x.new_empty((*shape, x.shape[1])) if keep_pooled else None)
    try:
        if checks.validates_cpu() and module.first_bad_offset(offsets, x.shape[0]) >= 0:
            return None
        module.folded_pooling_forward(call, outputs, torch.get_num_threads())
    except (TypeError, ValueError):
        return None
    return outputs


class _Recorded(torch.autograd.Function):
    """The node in autograd's graph of a native call whose outputs are there already."""

    @staticmethod
    def forward(ctx: Any, call: FoldedCall, outputs: FoldedOutputs, *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(outputs.pooled, call.offsets, *inputs)
        ctx.scale = call.scale
        return outputs.out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        pooled, offsets, *inputs = ctx.saved_tensors
        call = FoldedCall._make((*inputs, offsets, ctx.scale))
        needed = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # they shall be differentiated themselves
            return None, None, *_composed_gradients(call, grad_out, needed)
        return None, None, *_gradients(call, pooled, grad_out, needed)


def _composed_gradients(call: FoldedCall, grad_out: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
    # Views: two arguments may be one tensor, or one made from the other; each gets the gradient of its own place.
    names = [name for name, need in zip(call._fields, needed, strict=False) if need]
    wanted: dict[str, Any] = {name: (x := getattr(call, name)).view_as(x) for name in names}
    out = _pool_composed(call._replace(**wanted), "cpu")
    grads = dict(zip(wanted, torch.autograd.grad(out, [*wanted.values()], grad_out, create_graph=True), strict=True))
    return [grads.get(name) for name in call._fields[:5]]


def _gradients(call: FoldedCall, pooled: Tensor, grad_out: Tensor, needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
    seeds, key_weight, value_weight, bias, x, offsets, scale = call
    heads = seeds.shape[1:]
    folded = fold_seeds(seeds, key_weight)
    grad, left, weight = _multipliable(grad_out, pooled, value_weight)
    by_head = grad.flatten(0, 1).transpose(0, 1)  # [H, B*M, D]
    grad_value_weight = grad_bias = None
    if needed[2]:
        by_channel = torch.bmm(by_head.transpose(1, 2), left.flatten(0, 1).transpose(0, 1))  # [H, D, E]
        grad_value_weight = by_channel.flatten(0, 1).to(x.dtype)
    if needed[3] and bias is not None:
        grad_bias = grad.where(_not_empty(offsets), 0).sum((0, 1)).flatten().to(bias.dtype)
    if not (needed[0] or needed[1] or needed[4]):
        return None, None, grad_value_weight, grad_bias, None
    grad_pooled = torch.bmm(by_head, weight.unflatten(0, heads)).transpose(0, 1).to(x.dtype)
    attention = AttentionCall("shared", folded, x[:, None], None, None, offsets, scale=scale)
    arguments = grad_pooled.view(pooled.shape), None, None, None, *attention, "pma_pooling", "cpu"
    grad_folded, grad_x, *_ = autograd.gradients(registered, arguments, (True, True, False, False, False))
    assert grad_folded is not None
    assert grad_x is not None
    left, seed, weight = _multipliable(grad_folded, seeds, key_weight)
    weight = weight.unflatten(0, heads)
    grad_seeds = torch.einsum("mhw,hdw->mhd", left, weight).to(x.dtype) if needed[0] else None
    grad_key_weight = torch.einsum("mhw,mhd->hdw", left, seed).flatten(0, 1).to(x.dtype) if needed[1] else None
    return grad_seeds, grad_key_weight, grad_value_weight, grad_bias, grad_x[:, 0]
