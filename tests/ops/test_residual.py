"""A residual broadcasts to the output, in every operation that takes one; its gradient is summed over those axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import interformer_kernels as ik

OFFSETS = torch.tensor([0, 3, 3, 7])  # The last of the 8 tokens belongs to no row.
K, V, SEEDS, DENSE = (torch.randn(*shape, 2, 16) for shape in ((8,), (8,), (4,), (3, 4)))
X, WEIGHT = torch.randn(8, 16), torch.randn(3, 16, 16)
CALLS: dict[str, tuple[tuple[int, ...], Callable[..., Any]]] = {
    "pma_pooling": ((3, 4, 2, 16), lambda **kw: ik.pma_pooling(SEEDS, K, V, OFFSETS, **kw)),
    "jagged_attention": ((8, 2, 16), lambda **kw: ik.jagged_attention(K, K, V, OFFSETS, **kw)),
    "gated_cross_attention": ((3, 4, 2, 16), lambda **kw: ik.gated_cross_attention(DENSE, K, V, OFFSETS, **kw)),
    "personalized_ffn": ((8, 16), lambda **kw: ik.personalized_ffn(X, WEIGHT, OFFSETS, **kw)),
}


def shapes(full: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Without leading axes, and with each axis in turn, and all, of size one."""
    found = [full[n:] for n in range(1, len(full) + 1)]
    found += [(*full[:n], 1, *full[n + 1 :]) for n in range(len(full))]
    return [*found, (1,) * len(full)]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("op", CALLS)
def test_a_residual_broadcasts(op: str, backend: str) -> None:
    """The bits of the expanded one, and the sum of its gradient, in which tokens of no row (NaN here) have no part."""
    full, call = CALLS[op]
    grad_out = torch.randn(full)
    if full[0] == 8:
        grad_out[7] = torch.nan
    for shape in shapes(full):
        residual = torch.randn(shape, requires_grad=True)
        whole = residual.detach().expand(full).contiguous().requires_grad_()
        found, wanted = call(residual=residual, backend=backend), call(residual=whole, backend=backend)
        assert torch.equal(found, wanted), shape
        (grad,) = torch.autograd.grad(found, residual, grad_out)
        (each,) = torch.autograd.grad(wanted, whole, grad_out)
        torch.testing.assert_close(grad, each.sum_to_size(shape))


def test_learned_queries_as_residual() -> None:
    """Set Transformer adds the seeds themselves, whose gradients come from both places."""
    seeds = SEEDS.clone().requires_grad_()
    found = ik.pma_pooling(seeds, K, V, OFFSETS, residual=seeds)
    wanted = ik.pma_pooling(seeds, K, V, OFFSETS) + seeds
    torch.testing.assert_close(found, wanted)
    grads: list[Tensor] = [torch.autograd.grad(out.square().sum(), seeds)[0] for out in (found, wanted)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("op", CALLS)
def test_a_residual_that_does_not_broadcast_is_refused(op: str) -> None:
    full, call = CALLS[op]
    for shape in ((1, *full), (*full[:-1], 5), (2, *full[1:])):
        with pytest.raises(ValueError, match=rf"{op}: residual must broadcast to the output's shape \[{full[0]}, "):
            call(residual=torch.randn(shape))
