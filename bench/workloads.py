"""The bench's workloads: each op's inputs, its definition in eager PyTorch, and this package's implementation.

The ops are those of docs/ops.md, and `pma_folded`: pooling of projected tokens (`k = x W_k`, `v = x W_v`), which this
package computes without projecting them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import interformer_kernels
from interformer_kernels import testing

Inputs = Mapping[str, Any]
# An op, called with its keyword arguments.
OpFunction = Callable[..., Tensor]

OPS = ("jagged_attention", "pma_pooling", "pma_folded", "gated_cross_attention", "apply_rotary", "personalized_ffn")
DIFFERENTIABLE = {**testing.DIFFERENTIABLE, "pma_folded": ("seeds", "x", "key_weight", "value_weight")}


@dataclass(frozen=True)
class Sizes:
    """The sizes of a call apart from its rows.

    Attributes:
        heads: query heads, and as many key/value heads.
        head_size: of queries, keys and values; the width `E` of `personalized_ffn`. `apply_rotary` rotates all of it.
        queries: number of seeds, or of a row's dense queries.
        width: width of the tokens before projection (`pma_folded`); the width `F` of `personalized_ffn`.
        gated: with a gate and a residual of the output's shape (`gated_cross_attention`).
    """

    heads: int = 1
    head_size: int = 16
    queries: int = 1
    width: int = 0
    gated: bool = False

    def __str__(self) -> str:
        parts = [f"H{self.heads}", f"D{self.head_size}", f"M{self.queries}"]
        if self.width:
            parts.append(f"E{self.width}")
        return " ".join([*parts, *(["gated"] if self.gated else [])])


def inputs(
    op: str, lengths: Sequence[int], sizes: Sizes, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """The arguments of one call on rows of these lengths, with gradient leaves, and its `grad_out`."""
    if op == "pma_folded":
        return _folded_inputs(lengths, sizes, dtype, device, seed)
    value_size = sizes.width if op == "personalized_ffn" else sizes.head_size
    case = testing.Case(
        op,
        "bench",
        lengths=tuple(lengths),
        tail=0,
        queries=sizes.queries,
        heads=sizes.heads,
        kv_heads=sizes.heads,
        head_size=sizes.head_size,
        value_size=value_size,
        gate="full" if sizes.gated else "",
        residual=sizes.gated,
        rope=sizes.head_size if op == "apply_rotary" else 0,
    )
    return testing.make_inputs(case, dtype, device, seed)


def _folded_inputs(lengths: Sequence[int], sizes: Sizes, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
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


def key_offsets(arguments: Inputs) -> Tensor:
    """The offsets of the keys, whichever name the op has for them."""
    offsets = arguments["kv_offsets"] if "kv_offsets" in arguments else arguments["offsets"]
    assert isinstance(offsets, Tensor)
    return offsets


# ---------------------------------------------------------------- the definition, and this package's implementation


def definition(op: str, arguments: Inputs) -> Tensor:
    """The output of the definition, in the dtype of the arguments."""
    if op != "pma_folded":
        return testing.call_eager(op, arguments)[0]
    k, v = projected(arguments["x"], arguments["key_weight"], arguments["value_weight"])
    projections = {"seeds": arguments["seeds"], "k": k, "v": v, "offsets": arguments["offsets"]}
    return testing.call_eager("pma_pooling", projections)[0]


def projected(x: Tensor, key_weight: Tensor, value_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values `[T, H, D]` of tokens `[T, E]`."""
    shape = len(x), *key_weight.shape[1:]
    return (x @ key_weight.flatten(1)).view(shape), (x @ value_weight.flatten(1)).view(shape)


def fold(seeds: Tensor, key_weight: Tensor) -> Tensor:
    """The seeds times the key weights, `[M, H, E]`: with raw tokens they have the scores of projected keys."""
    return torch.einsum("mhd,ehd->mhe", seeds, key_weight)


def unfold(pooled: Tensor, value_weight: Tensor) -> Tensor:
    """Project pooled raw tokens `[B, M, H, E]` to pooled values `[B, M, H, D]`."""
    return torch.einsum("bmhe,ehd->bmhd", pooled, value_weight)


def ours(op: str, backend: str | None = None) -> OpFunction:
    """This package's implementation of the op."""

    def folded(seeds: Tensor, x: Tensor, key_weight: Tensor, value_weight: Tensor, offsets: Tensor) -> Tensor:
        pooled = interformer_kernels.pma_pooling(
            fold(seeds, key_weight), x[:, None], None, offsets, scale=seeds.shape[-1] ** -0.5, backend=backend
        )
        assert isinstance(pooled, Tensor)
        return unfold(pooled, value_weight)

    def public(**arguments: Any) -> Tensor:
        out = getattr(interformer_kernels, op)(**arguments, backend=backend)
        assert isinstance(out, Tensor)
        return out

    return folded if op == "pma_folded" else public


def kernel_of(op: str) -> str:
    """The op of this package whose kernel does the work."""
    return "pma_pooling" if op == "pma_folded" else op


# ---------------------------------------------------------------- the two passes


def forward(function: OpFunction, arguments: Inputs) -> Tensor:
    """The output without gradients, as in inference."""
    with torch.no_grad():
        return function(**{name: x for name, x in arguments.items() if name != "grad_out"})


def training(op: str, function: OpFunction, arguments: Inputs) -> dict[str, Tensor]:
    """The output and every gradient, as in training."""
    names = [name for name in DIFFERENTIABLE[op] if arguments.get(name) is not None]
    out = function(**{name: x for name, x in arguments.items() if name != "grad_out"})
    grads = torch.autograd.grad(out, [arguments[name] for name in names], arguments["grad_out"])
    return {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(names, grads, strict=True)}}
