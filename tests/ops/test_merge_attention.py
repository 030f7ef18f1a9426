"""Attentions over parts of the keys merge into the attention over all of them, gradients included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grid import backends
from torch import Tensor

import interformer_kernels as ik
from interformer_kernels.testing import offsets_of

LAYOUTS = ("packed", "dense", "shared")
LENGTHS = (5, 0, 1, 9)  # a row without keys, and one with an empty part


def attend(layout: str, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], **options: Any) -> Any:
    """Attention over rows of these lengths, in one of the layouts."""
    offsets = offsets_of(lengths)
    if layout == "shared":
        return ik.pma_pooling(q, k, v, offsets, return_lse=True, **options)
    q_offsets = offsets_of((2, 3, 1, 2)) if layout == "packed" else None
    return ik.gated_cross_attention(q, k, v, offsets, q_offsets=q_offsets, return_lse=True, **options)


def in_parts(layout: str, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The same over the first two keys of each row, and over the others, merged."""
    row = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    first = torch.arange(len(row)) - offsets_of(LENGTHS)[row] < 2
    parts = []
    for chosen in (first, ~first):
        lengths = tuple(torch.bincount(row[chosen], minlength=len(LENGTHS)).tolist())
        parts.append(attend(layout, q, k[chosen], v[chosen], lengths, **options))
    return ik.merge_attention(*map(list, zip(*parts, strict=True)))


def over_twice_the_keys(layout: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Every row over keys of its own, and over as many others, merged: nothing of it depends on lengths."""
    parts = [attend(layout, q, x, y, LENGTHS) for x, y in ((k, v), (k.flip(0), v.flip(0)))]
    return ik.merge_attention([out for out, _ in parts], [lse for _, lse in parts])


def z_loss(out: Tensor, lse: Tensor) -> Tensor:
    """A loss of both results."""
    return out.square().sum() + lse.masked_fill(lse == -torch.inf, 0).square().mean()


def tensors(layout: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    q = {"packed": (8, 4, 6), "dense": (4, 2, 4, 6), "shared": (2, 4, 6)}[layout]
    shapes = q, (sum(LENGTHS), 2, 6), (sum(LENGTHS), 2, 3)
    return tuple(torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes)


@pytest.mark.parametrize("backend", backends("gated_cross_attention"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_keys_cut_in_two_are_the_whole(layout: str, backend: str) -> None:
    for dtype in (torch.float64, torch.float32):
        leaves = tensors(layout, dtype)
        whole, merged = attend(layout, *leaves, LENGTHS, backend=backend), in_parts(layout, *leaves, backend=backend)
        torch.testing.assert_close(merged, whole)
        grads = [torch.autograd.grad(z_loss(*results), leaves) for results in (merged, whole)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients(layout: str) -> None:
    """Against finite differences, twice, and compiled."""
    leaves = tensors(layout, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: z_loss(*in_parts(layout, *x)), leaves)
    assert torch.autograd.gradgradcheck(lambda *x: z_loss(*attend(layout, *x, LENGTHS)), leaves)
    torch._dynamo.reset()
    compiled = torch.compile(over_twice_the_keys, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(z_loss(*run(layout, *leaves)), leaves) for run in (compiled, over_twice_the_keys)]
    torch.testing.assert_close(*grads)


def test_parts_that_see_nothing() -> None:
    out, lse = torch.randn(3, 2, 4).half().requires_grad_(), torch.randn(3, 2)
    lse[1] = -torch.inf
    lse.requires_grad_()
    zeros, nothing = torch.zeros_like(out), torch.full_like(lse, -torch.inf).requires_grad_()
    merged, merged_lse = ik.merge_attention((out, zeros), (lse, nothing))
    assert merged.dtype == torch.float16
    assert torch.equal(merged_lse, lse)
    assert torch.equal(merged, out.where(lse[..., None] > -torch.inf, 0))
    for grad in torch.autograd.grad((merged.sum(), merged_lse.sum()), (out, lse, nothing)):
        assert grad.isfinite().all()
        assert not grad[1].any()
    alone = ik.merge_attention([out], [lse])
    assert torch.equal(alone[0], merged)
    assert torch.equal(alone[1], merged_lse)


OUT, LSE = torch.zeros(3, 2, 4), torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("outs", "lses", "error", "message"),
    [
        (OUT, [LSE], TypeError, r"outs must be a tuple or list of tensors, found a tensor"),
        ([], [], ValueError, "outs must have at least one entry, found none"),
        ([OUT, OUT], [LSE], ValueError, "lses must have 2 entries, as outs has, found 1"),
        ([OUT.long()], [LSE], TypeError, r"outs\[0\] must be a floating tensor \[..., H, Dv\], found a tensor"),
        ([OUT, OUT.half()], [LSE, LSE], TypeError, r"outs\[1\] must be a tensor of torch.float32, found a tensor"),
        ([OUT, OUT[:2]], [LSE, LSE], ValueError, r"outs\[1\] must have the shape \[3, 2, 4\], found \[2, 2, 4\]"),
        ([OUT.half()], [LSE.half()], TypeError, r"lses\[0\] must be a tensor of torch.float32, found a tensor"),
        ([OUT], [OUT], ValueError, r"lses\[0\] must have the shape \[3, 2\], found \[3, 2, 4\]"),
        ([OUT], [LSE.to("meta")], ValueError, r"lses\[0\] must be on cpu, found meta"),
    ],
)
def test_errors(outs: Any, lses: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^merge_attention: {message}"):
        ik.merge_attention(outs, lses)
