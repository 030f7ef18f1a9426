"""Slices of one tensor as queries, keys and values: their gradients come as slices of one tensor, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from interformer_kernels import jagged_attention
from interformer_kernels.ops import slices
from interformer_kernels.ops.slices import unbind_slices
from interformer_kernels.testing import offsets_of, rotary_tables

pytest.importorskip("interformer_kernels._C", exc_type=ImportError)

# Short rows and a tail, one row of several shards, rows beyond a tile, single tokens.
LENGTHS = {"short": (5, 0, 37, 1, 8), "giant": (1500,), "long": (300, 2, 90), "single": (1,) * 20}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rope": {"rope": rotary_tables(1500, 16)},
    "window": {"window": (2, 3), "num_prefix": 1},
    "silu": {"score": "silu"},
}


def _gradient(x: Tensor, lengths: Sequence[int], split: Callable[[Tensor], Sequence[Tensor]], **options: Any) -> Tensor:
    x = x.detach().requires_grad_()
    q, k, v = split(x)
    out = jagged_attention(q, k, v, offsets_of(lengths), **options)
    return torch.autograd.grad(out, x, torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))[0]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_separate_tensors(
    lengths: str, options: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, joined = LENGTHS[lengths], []
    x = torch.randn(sum(rows) + 3, 3, 2, 16, dtype=dtype)
    wanted = _gradient(x, rows, lambda x: [part.clone() for part in x.unbind(1)], **OPTIONS[options])
    whole = slices._side_by_side
    monkeypatch.setattr(slices, "_side_by_side", lambda grads: joined.append(whole(grads)) or joined[-1])
    found = _gradient(x, rows, unbind_slices, **OPTIONS[options])
    assert torch.equal(found, wanted)
    assert joined[0] is not None
    assert found.untyped_storage().data_ptr() == joined[0].untyped_storage().data_ptr()


def test_other_gradients_are_put_together() -> None:
    x = torch.randn(7, 3, 2, 4, requires_grad=True)
    weights = torch.randn(3, 7, 2, 4)
    parts = unbind_slices(x)
    torch.stack([(part * weight).sum() for part, weight in zip(parts, weights, strict=True)]).sum().backward()
    assert torch.equal(x.grad, weights.transpose(0, 1))
    only_last = torch.autograd.grad(unbind_slices(x)[2].sum(), x)[0]
    assert torch.equal(only_last, torch.tensor([0.0, 0, 1]).view(1, 3, 1, 1).expand_as(x))


def test_second_derivatives() -> None:
    x = torch.randn(5, 3, 1, 2, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        q, k, v = unbind_slices(x)
        return jagged_attention(q, k, v, offsets_of((2, 3)))

    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)
