"""`pma_pooling` of projected tokens without projecting each token: the projections are folded into seeds and output.

Plain tensor functions without parameters, shared by `nn.PMAPooling`, InterFormer's PMA and the bench.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
    pooled = pma_pooling(fold_seeds(seeds, key_weight), x[:, None], None, offsets, scale=scale, backend=backend)
    assert isinstance(pooled, Tensor)
    heads = seeds.shape[1:]
    projected = project_pooled(pooled, value_weight, heads)
    if value_bias is None:
        return projected
    not_empty = (offsets.diff() > 0)[:, None, None, None]
    return projected + value_bias.to(projected.dtype).view(heads).where(not_empty, 0)


def fold_seeds(seeds: Tensor, key_weight: Tensor) -> Tensor:
    """Seeds `[M, H, D]` times the key projection `[E, width]`: queries `[M, H, width]` for raw tokens."""
    return torch.einsum("mhd,hdw->mhw", seeds, key_weight.unflatten(0, seeds.shape[1:]))


def project_pooled(pooled: Tensor, value_weight: Tensor, heads: tuple[int, ...]) -> Tensor:
    """Pooled raw tokens `[B, M, H, width]` through the value projection `[E, width]`: `[B, M, *heads = (H, D)]`.

    The same as `einsum("bmhw,hdw->bmhd")`, which asks whether B is 1, so that an exported program would refuse a single
    row. The copy replaces the one that joining the heads would make.
    """
    by_head = torch.bmm(
        merge_rows(pooled).transpose(0, 1), value_weight.unflatten(0, heads).transpose(1, 2)
    )  # [H, B*M, D]
    by_row = by_head.transpose(0, 1).clone(memory_format=torch.contiguous_format)
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
