"""Tensors on `meta`, which have no contents: outputs and gradients of the right shape come out, and nothing is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from grid import ALL_CASES, case_ids
from torch import Tensor, nn

import interformer_kernels as ik
from interformer_kernels import jagged, testing
from interformer_kernels.testing import Case


def on_meta(x: Any) -> Any:
    if isinstance(x, (tuple, list)):
        return tuple(map(on_meta, x))
    return x.detach().to("meta").requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def described(found: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: (x.shape, x.dtype) for name, x in found.items()}


@pytest.mark.parametrize("case", ALL_CASES, ids=case_ids(ALL_CASES))
def test_ops(case: Case) -> None:
    inputs = testing.make_inputs(case, torch.bfloat16)
    moved = {name: on_meta(x) for name, x in inputs.items()}
    found = testing.evaluate(lambda: testing.call(case.op, moved, None), case.op, moved)
    assert all(x.is_meta for x in found.values())
    wanted = testing.evaluate(lambda: testing.call(case.op, inputs, "reference"), case.op, inputs)
    assert described(found) == described(wanted)


@pytest.mark.parametrize("op", testing.OPS)
def test_second_derivatives_and_autocast(op: str) -> None:
    case = Case(op, "", gate="" if op in ("apply_rotary", "personalized_ffn") else "full", rope=4)
    inputs = {name: on_meta(x) for name, x in testing.make_inputs(case, torch.float32).items()}
    leaves = [inputs[name] for name in testing.DIFFERENTIABLE[op] if inputs.get(name) is not None]
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = testing.call(op, inputs, None)
    assert out.dtype == torch.float32  # as PyTorch's own operations on meta
    first = torch.autograd.grad(out, leaves, inputs["grad_out"], create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in first), leaves)
    assert [x.shape for x in second] == [x.shape for x in leaves]
    assert all(x.is_meta for x in (*first, *second))


PLACE: dict[str, Any] = {"batch_first": True}
MODULES: dict[str, Any] = {
    "self": lambda: ik.nn.JaggedSelfAttention(8, 2, causal=True, **PLACE),
    "self, dropout": lambda: ik.nn.JaggedSelfAttention(8, 2, dropout=0.5, **PLACE),
    "pooling": lambda: ik.nn.PMAPooling(8, 2, 2, **PLACE),
    "folded": lambda: ik.nn.PMAPooling(8, 2, 1, fold=True, **PLACE),
    "pooling, dropout": lambda: ik.nn.PMAPooling(8, 2, 2, dropout=0.5, **PLACE),
    "set transformer": lambda: ik.nn.PMAPooling(8, 2, 2, set_transformer=True, **PLACE),
    "cross": lambda: ik.nn.GatedCrossAttention(8, 2, **PLACE),
    "cross, dropout": lambda: ik.nn.GatedCrossAttention(8, 2, dropout=0.5, **PLACE),
    "ffn": lambda: ik.nn.PersonalizedFFN(8, 4, 6, activation="silu", **PLACE),
}


def run(module: nn.Module, form: str, place: str) -> tuple[Tensor, dict[str, Any]]:
    """A forward and backward of the module on packed or padded rows of 2, 0 and 3 tokens."""
    packed = form == "packed"
    x = torch.randn((5, 8) if packed else (3, 4, 8))
    mask = torch.arange(4) < torch.tensor([2, 0, 3])[:, None]
    keys: dict[str, Tensor] = {"packed": {"offsets": torch.tensor([0, 2, 2, 5])}, "mask": {"key_mask": mask}}.get(
        form, {}
    )
    if form == "integer padding mask":
        keys = {"key_padding_mask": (~mask).int()}
    if isinstance(module, ik.nn.GatedCrossAttention):
        keys = {name.replace("offsets", "kv_offsets"): value for name, value in keys.items()}
        arguments: tuple[Tensor, ...] = torch.randn(3, 2, 8), x
    else:
        arguments = (x, torch.randn(3, 4)) if isinstance(module, ik.nn.PersonalizedFFN) else (x,)
    out = module(*(a.to(place) for a in arguments), **{name: value.to(place) for name, value in keys.items()})
    out.sum().backward()
    return out, {name: p.grad.shape for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("form", ["packed", "padded", "mask", "integer padding mask"])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str, form: str) -> None:
    wanted = run(MODULES[name](), form, "cpu")
    found = run(MODULES[name]().to("meta"), form, "meta")
    assert found[0].is_meta
    assert found[0].shape == wanted[0].shape
    assert found[1] == wanted[1]
    assert found[1]


def test_converters_take_as_many_tokens_as_there_can_be() -> None:
    x, lengths = (
        torch.randn(3, 4, 2, device="meta", requires_grad=True),
        torch.ones(3, dtype=torch.int64, device="meta"),
    )
    offsets = jagged.offsets_from_lengths(lengths)
    assert offsets.is_meta
    assert offsets.shape == (4,)
    masks: list[dict[str, Any]] = [{"lengths": lengths, "side": "left"}, {"mask": x[..., 0] > 0}]
    masks.append({"padding_mask": torch.zeros(3, 4, dtype=torch.int64, device="meta")})
    for mask in masks:
        values, offsets, layout = jagged.from_padded(x, **mask)
        assert values.shape == (12, 2)
        assert layout.pad(values).shape == x.shape
        values.sum().backward()
    assert jagged.to_padded(values, offsets, max_length=5, side="left").shape == (3, 5, 2)
    assert jagged.to_padded(values, offsets).shape == (3, 12, 2)
    nested = jagged.to_nested(values, offsets)
    assert jagged.from_nested(nested).values.shape == values.shape
    assert jagged.to_torchrec(values, offsets, lambda values, offsets: jagged.Jagged(values, offsets)).values.is_meta
