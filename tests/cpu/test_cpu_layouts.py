"""The CPU kernels read tensors where they lie: any strides, lazily negated or conjugated, beyond 2^31 numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cpu_calls import (
    MEMORY_LAYOUTS,
    all_ops,
    differing,
    name_of,
    relaid_inputs,
    replaced,
    results,
)
from torch import Tensor

import interformer_kernels
from interformer_kernels import _backend, testing
from interformer_kernels.testing import Case, make_inputs, offsets_of

_C = pytest.importorskip("interformer_kernels._C", exc_type=ImportError)


class Spy:
    """Wraps the native module and records the addresses of the tensors that it gets."""

    def __init__(self) -> None:
        self.handed: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            entries = [x for arg in args for x in (arg if isinstance(arg, tuple) else [arg])]
            self.handed |= {x.data_ptr() for x in entries if isinstance(x, Tensor)}
            return getattr(_C, name)(*args)

        return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", MEMORY_LAYOUTS)
def test_strided_inputs_are_read_in_place(layout: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy()
    for module in ("attention", "personalized_ffn", "apply_rotary", "jagged_softmax", "jagged_weighted_sum"):
        monkeypatch.setattr(f"interformer_kernels._cpu.{module}._C", spy)
    monkeypatch.setattr(_backend, "native", lambda: spy)
    for case in all_ops((5, 0, 70), kv_heads=2, head_size=8, value_size=16):
        gated = {"gate": "full", "residual": True} if case.op.endswith(("attention", "pooling")) else {}
        inputs = make_inputs(Case(**{**vars(case), **gated}), dtype)
        strided = relaid_inputs(inputs, layout)
        for name in ("offsets", "kv_offsets", "q_offsets"):
            if inputs.get(name) is not None:
                strided[name] = torch.stack((inputs[name], inputs[name].flip(0)), 1)[:, 0].int()
        spy.handed.clear()
        assert not differing(results(case.op, strided), results(case.op, inputs)), name_of(case)
        read_in_place = {name: x for name, x in strided.items() if isinstance(x, Tensor)}
        if layout == "channels apart":  # the kernels read these by whole vectors, so they are copied
            copied = {"k", "v", *(("scores", "weights", "grad_out") if case.op.endswith(("softmax", "sum")) else ())}
        else:  # transposed tensors of tokens and heads have their heads apart
            copied = {"scores", "weights", *(("grad_out",) if case.op == "jagged_softmax" else ())}
            copied = copied if layout == "transposed" else set()
        read_in_place = {name: x for name, x in read_in_place.items() if name not in copied}
        assert {name for name, x in read_in_place.items() if x.data_ptr() not in spy.handed} == set()


@pytest.mark.parametrize("case", all_ops((4, 5), head_size=8, value_size=8), ids=name_of)
def test_lazily_negated_views(case: Case) -> None:
    def negated(name: str, x: Tensor) -> Tensor:
        view = torch.complex(torch.zeros_like(x), -x).conj().imag
        assert view.is_neg()
        return view

    inputs = make_inputs(Case(**{**vars(case), "tail": 0}), torch.float64)
    lazy = replaced(inputs, negated)
    lazy["grad_out"] = negated("grad_out", inputs["grad_out"])
    if "rope" in inputs:
        lazy["rope"] = tuple(negated("rope", x) for x in inputs["rope"])
    assert not differing(results(case.op, lazy), results(case.op, inputs))


def test_lazily_conjugated_views() -> None:
    """Their halves are lazily negated, as above. Whole, they are complex, which no kernel takes."""
    x = torch.randn(9, 1, 4, dtype=torch.complex64).conj()
    assert x.is_conj()
    rows = {"offsets": offsets_of((9,)), "backend": "cpu"}
    with pytest.raises(TypeError, match="jagged_attention: q must be a tensor of float32, .*complex64"):
        interformer_kernels.jagged_attention(x, x, x, **rows)
    half = x.imag
    assert half.is_neg()
    actual = interformer_kernels.jagged_attention(half, half, half, **rows)
    assert torch.equal(actual, interformer_kernels.jagged_attention(*[half.clone()] * 3, **rows))


@pytest.mark.parametrize(
    ("op", "far"),
    [("pma_pooling", "k"), ("pma_pooling", "v"), ("jagged_attention", "q"), ("gated_cross_attention", "q"),
     ("gated_cross_attention", "residual"), ("jagged_attention", "gate"), ("personalized_ffn", "x"),
     ("personalized_ffn", "weight"), ("apply_rotary", "x"), ("jagged_softmax", "scores"), ("jagged_weighted_sum", "v")],
)  # fmt: skip
def test_beyond_two_to_the_31(op: str, far: str) -> None:
    """Element offsets need 64 bits. Only a few pages of the memory are ever touched."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    step = 2**31 + 100
    epilogue = {} if not op.endswith(("attention", "pooling")) else {"gate": "full", "residual": True}
    sizes = {"heads": 1, "kv_heads": 1, "head_size": 4, "value_size": 4, "queries": 2, "rope": 0, "tail": 0}
    lengths = (1, 1) if far == "weight" or op == "gated_cross_attention" else (2,)
    case = Case(op, "", lengths=lengths, **{**sizes, **epilogue, "rope": 4 if op == "apply_rotary" else 0})

    def moved(name: str, x: Tensor) -> Tensor:
        if name != far:
            return x
        assert x.shape[0] == 2
        wide = torch.empty(step + x[0].numel(), dtype=x.dtype).as_strided(x.shape, (step, *x.stride()[1:]))
        return wide.copy_(x)

    inputs = make_inputs(case, torch.bfloat16)
    distant = replaced(inputs, moved)
    with torch.no_grad():  # gradients have the inputs' shapes, but not their strides
        out = testing.call(op, distant, "cpu")[0]
    torch.utils.deterministic.fill_uninitialized_memory = True
    actual = results(op, inputs)
    assert torch.equal(out, actual["out"])
    assert not differing(results(op, distant), actual)
