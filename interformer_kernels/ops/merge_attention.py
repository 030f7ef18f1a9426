"""Several attentions over disjoint keys, merged into the one over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from interformer_kernels import _checks as checks

_OP = "merge_attention"


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    r"""Merge attentions of the same queries over disjoint keys: the result is attention over all of these keys.

    .. math:: lse = \log \sum_i e^{lse_i}, \qquad out = \sum_i e^{lse_i - lse}\, out_i

    Each part is a call of :func:`jagged_attention`, :func:`pma_pooling` or :func:`gated_cross_attention` under softmax,
    with ``return_lse=True`` and without gate and residual, which belong after the merge. The result may be a part of
    another merge. Gradients, those of both results, reach all inputs of the parts.

    Args:
        outs: outputs of the parts, one or more, all of one shape ``[..., H, Dv]``, dtype and device.
        lses: their log-sum-exps ``[..., H]``, float32 (float64 for float64).

    Returns:
        ``(out, lse)``, of the shapes and dtypes of a part's; sums are in the dtype of ``lses``. A query that sees
        nothing in any part has ``out = 0`` and ``lse = -inf``, and no gradient.

    Raises:
        TypeError: an entry is not a floating tensor of the dtype wanted.
        ValueError: there are no parts, not as many of one as of the other, or shapes or devices differ.

    Source: online softmax (Milakov and Gimelshein, arXiv 1805.02867); FlashInfer and vLLM call it ``merge_states``,
    xFormers ``merge_attentions``.
    """
    _check(outs, lses)
    parts = torch.stack(tuple(lses))
    nothing = (parts == -torch.inf).all(0)
    # Parts of a query that sees nothing become equal and constant, so that no difference of infinities is taken.
    parts = parts.masked_fill(nothing, 0)
    weights = torch.softmax(parts, 0).masked_fill(nothing, 0)
    out = sum(weight[..., None] * x.to(weight.dtype) for weight, x in zip(weights, outs, strict=True))
    assert isinstance(out, Tensor)
    return out.to(outs[0].dtype), torch.logsumexp(parts, 0).masked_fill(nothing, -torch.inf)


def _check(outs: object, lses: object) -> None:
    for name, parts in (("outs", outs), ("lses", lses)):
        if not isinstance(parts, (tuple, list)):
            raise TypeError(f"{_OP}: {name} must be a tuple or list of tensors, found {checks.describe(parts)}")
    assert isinstance(outs, (tuple, list))
    assert isinstance(lses, (tuple, list))
    if not outs:
        raise ValueError(f"{_OP}: outs must have at least one entry, found none")
    if len(lses) != len(outs):
        raise ValueError(f"{_OP}: lses must have {len(outs)} entries, as outs has, found {len(lses)}")
    first = outs[0]
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if not isinstance(out, Tensor) or out.dtype not in checks.FLOAT_DTYPES or out.dim() < 1:
            wanted = "a floating tensor [..., H, Dv]"
            raise TypeError(f"{_OP}: outs[{i}] must be {wanted}, found {checks.describe(out)}")
        _check_like(f"outs[{i}]", out, first.dtype, first.shape, first.device)
        exact = torch.float64 if first.dtype == torch.float64 else torch.float32
        _check_like(f"lses[{i}]", lse, exact, first.shape[:-1], first.device)


def _check_like(name: str, x: object, dtype: torch.dtype, shape: torch.Size, device: torch.device) -> None:
    if not isinstance(x, Tensor) or x.dtype != dtype:
        raise TypeError(f"{_OP}: {name} must be a tensor of {dtype}, found {checks.describe(x)}")
    if x.shape != shape:
        raise ValueError(f"{_OP}: {name} must have the shape {list(shape)}, found {list(x.shape)}")
    if x.device != device:
        raise ValueError(f"{_OP}: {name} must be on {device}, found {x.device}")
