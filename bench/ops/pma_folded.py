"""`pma_folded` in the bench: pooling of projected tokens (`k = x W_k`, `v = x W_v`).

This package pools the raw tokens, without projecting them: `pool_folded`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from interformer_bench.ops.call import OpFunction, Sizes
from interformer_bench.ops.pma_pooling import pooling_peers
from interformer_bench.ops.spec import BenchOp, Composed, GridRow, attention_flops
from interformer_bench.peers import Peer, cores, rows
from interformer_bench.peers.peer import FOLDS, PROJECTS
from torch import Tensor

from interformer_kernels import testing
from interformer_kernels.ops.pma_folded import pool_folded

# Heads times head size is the width of the tokens.
_GRID = (
    GridRow("movielens", rows=256, heads=4, head_size=16, queries=4, kind="folded", quick=True),
    GridRow("beauty", rows=1024, heads=8, head_size=16, queries=2, kind="folded"),
    GridRow("grocery", rows=1024, heads=4, head_size=16, queries=2, kind="folded"),
    GridRow("diginetica", rows=2048, heads=4, head_size=16, queries=2, kind="folded"),
    GridRow("uniform 1..50", rows=1024, heads=4, head_size=16, queries=4, kind="folded", bfloat16=True, quick=True),
    GridRow("uniform 1..50", rows=1024, heads=8, head_size=16, queries=2, kind="folded"),
    GridRow("log-normal, mean 100", rows=256, heads=4, head_size=16, queries=4, kind="folded", bfloat16=True),
    GridRow("log-normal, mean 100", rows=256, heads=8, head_size=16, queries=2, kind="folded"),
    GridRow("log-normal, mean 500", rows=64, heads=4, head_size=16, queries=4, kind="folded"),
    GridRow("all 1024", rows=64, heads=4, head_size=16, queries=4, kind="folded"),
    GridRow("all 104", rows=2048, heads=4, head_size=16, queries=4, kind="folded"),
    GridRow("fill 0.1", rows=256, heads=4, head_size=16, queries=4, kind="folded", memory=True),
    GridRow("fill 0.5", rows=128, heads=4, head_size=16, queries=2, kind="folded"),
    GridRow("fill 1.0", rows=64, heads=4, head_size=16, queries=4, kind="folded"),
)


def _flops(lengths: Sequence[int], sizes: Sizes) -> tuple[int, int]:
    """`4 M H E T + 2 M H D E (1 + B)` (fold, apply `W_v`), and `10 M H E T + 4 M H D E (1 + B)`."""
    forward, backward = attention_flops(2 * sizes.queries * sizes.heads * sizes.width * sum(lengths))
    projections = 2 * sizes.queries * sizes.heads * sizes.head_size * sizes.width * (1 + len(lengths))
    return forward + projections, backward + 2 * projections


# ---------------------------------------------------------------- the computation


def _inputs(lengths: Sequence[int], sizes: Sizes, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    numbers = testing.Numbers(device, seed)

    def leaf(*shape: int, scale: float = 1.0) -> Tensor:
        return (numbers.normal(shape) * scale).to(device, dtype).requires_grad_()

    H, D, E = sizes.heads, sizes.head_size, sizes.width
    return {
        "seeds": leaf(sizes.queries, H, D),
        "x": leaf(sum(lengths), E),
        "key_weight": leaf(E, H, D, scale=E**-0.5),
        "value_weight": leaf(E, H, D, scale=E**-0.5),
        "offsets": testing.offsets_of(lengths, device=device),
        "grad_out": leaf(len(lengths), sizes.queries, H, D).detach(),
    }


def _projected(x: Tensor, key_weight: Tensor, value_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values `[T, H, D]` of tokens `[T, E]`."""
    shape = len(x), *key_weight.shape[1:]
    return (x @ key_weight.flatten(1)).view(shape), (x @ value_weight.flatten(1)).view(shape)


def _fold(seeds: Tensor, key_weight: Tensor) -> Tensor:
    """The seeds times the key weights, `[M, H, E]`: with raw tokens they have the scores of projected keys."""
    return torch.einsum("mhd,ehd->mhe", seeds, key_weight)


def _unfold(pooled: Tensor, value_weight: Tensor) -> Tensor:
    """Project pooled raw tokens `[B, M, H, E]` to pooled values `[B, M, H, D]`."""
    return torch.einsum("bmhe,ehd->bmhd", pooled, value_weight)


def _definition(seeds: Tensor, x: Tensor, key_weight: Tensor, value_weight: Tensor, offsets: Tensor) -> Tensor:
    k, v = _projected(x, key_weight, value_weight)
    return testing.call_eager("pma_pooling", {"seeds": seeds, "k": k, "v": v, "offsets": offsets})[0]


def _ours(backend: str | None) -> OpFunction:
    def folded(seeds: Tensor, x: Tensor, key_weight: Tensor, value_weight: Tensor, offsets: Tensor) -> Tensor:
        weights = key_weight.flatten(1).T, value_weight.flatten(1).T  # [H * D, E], as modules have them
        return pool_folded(seeds, *weights, None, x, offsets, scale=cores.default_scale(seeds), backend=backend)

    return folded


# ---------------------------------------------------------------- peers


def _projecting(pooling: OpFunction) -> OpFunction:
    """Project every token, then pool."""

    def run(seeds: Tensor, x: Tensor, key_weight: Tensor, value_weight: Tensor, offsets: Tensor) -> Tensor:
        k, v = _projected(x, key_weight, value_weight)
        return pooling(seeds=seeds, k=k, v=v, offsets=offsets)

    return run


def _folding(pooling: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> OpFunction:
    """Fold the key weights into the seeds, pool raw tokens `[T, E]`, and apply the value weights."""

    def run(seeds: Tensor, x: Tensor, key_weight: Tensor, value_weight: Tensor, offsets: Tensor) -> Tensor:
        pooled = pooling(_fold(seeds, key_weight), x, offsets, cores.default_scale(seeds))
        return _unfold(pooled, value_weight)

    return run


# Cores that pool raw tokens, and compiled ones that are left out where every token is projected: compiling takes longer
# than everything else, and the projection is most of their time.
_FOLDED = (
    "padded SDPA",
    "bucketed SDPA",
    "sorted SDPA",
    "FBGEMM",
    "eager with mask",
    "torch.compile",
    "torch.compile by bucket",
)
_NOT_PROJECTED = ("torch.compile by bucket", "torch.compile by row")


def _peers() -> dict[str, Peer]:
    projected = {
        f"projected, {name}": replace(peer, run=_projecting(peer.run), group=PROJECTS)
        for name, peer in pooling_peers().items()
        if name not in _NOT_PROJECTED
    }

    def one_head(core: cores.AttentionCore) -> OpFunction:
        """Folded seeds as queries of one head over the raw tokens."""

        def pool(seeds: Tensor, x: Tensor, offsets: Tensor, scale: float) -> Tensor:
            queries = seeds.flatten(0, 1)[:, None].expand(len(offsets) - 1, -1, -1, -1)
            return core(queries, x[:, None], x[:, None], offsets, scale).view(-1, *seeds.shape)

        return _folding(pool)

    available = cores.dense_cores()
    chosen = {name: available[name] for name in _FOLDED if name in available}
    folded = {f"folded, {n}": replace(peer, run=one_head(peer.run), group=FOLDS) for n, peer in chosen.items()}
    return {**projected, **folded, "folded, row by row": Peer(_folding(rows.folded), group=FOLDS)}


OP = BenchOp(
    name="pma_folded",
    grid=_GRID,
    flops=_flops,
    peers=_peers,
    memory_peers=("projected, padded SDPA", "folded, padded SDPA", "folded, row by row"),
    composed=Composed(
        kernel="pma_pooling",
        differentiable=("seeds", "x", "key_weight", "value_weight"),
        inputs=_inputs,
        definition=_definition,
        ours=_ours,
    ),
    attends=True,
    has_width=True,
)
