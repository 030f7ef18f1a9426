"""Softmax and weighted sum by scores of a caller's own: the forms without heads, and scores of -inf."""

from __future__ import annotations

import pytest
import torch

import interformer_kernels as ik
from interformer_kernels.testing import offsets_of

LENGTHS = (3, 0, 20, 4)
OFFSETS = offsets_of(LENGTHS)
TOKENS = sum(LENGTHS) + 2

over_backends = pytest.mark.parametrize("backend", ["reference", "cpu"])


@over_backends
def test_without_heads_they_are_one_head(backend: str) -> None:
    scores, v = torch.randn(TOKENS, 3)[:, 1].requires_grad_(), torch.randn(TOKENS, 5, requires_grad=True)
    weights = ik.jagged_softmax(scores, OFFSETS, backend=backend)
    sums = ik.jagged_weighted_sum(weights, v, OFFSETS, backend=backend)
    assert (weights.shape, sums.shape) == ((TOKENS,), (len(LENGTHS), 5))
    with_head = ik.jagged_softmax(scores[:, None], OFFSETS, backend=backend)
    with_heads = ik.jagged_weighted_sum(with_head, v[:, None], OFFSETS, backend=backend)
    assert torch.equal(with_heads.squeeze(1), sums)
    grads = torch.autograd.grad(sums.square().sum(), (scores, v))
    wanted = torch.autograd.grad(with_heads.square().sum(), (scores, v))
    assert all(map(torch.equal, grads, wanted))


@over_backends
@pytest.mark.parametrize("heads", [1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_of_minus_infinity_are_hidden(backend: str, heads: int, dtype: torch.dtype) -> None:
    """Rows are what they are without the hidden tokens; a row of nothing else, and its gradients, are zero."""
    scores = torch.randn(TOKENS, heads, dtype=dtype)
    scores[:3], scores[5], scores[-2:] = -torch.inf, -torch.inf, torch.nan
    shown = torch.arange(TOKENS).ge(3) & (torch.arange(TOKENS) != 5)
    grad = torch.randn(TOKENS, heads, dtype=dtype)

    def both(x: torch.Tensor, offsets: torch.Tensor, grad_out: torch.Tensor) -> list[torch.Tensor]:
        x = x.detach().requires_grad_()
        out = ik.jagged_softmax(x, offsets, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, x, grad_out)]

    without = both(scores[shown], offsets_of((0, 0, 19, 4)), grad[shown])
    for found, wanted in zip(both(scores, OFFSETS, grad), without, strict=True):
        assert not found[~shown].any()
        torch.testing.assert_close(found[shown], wanted)
