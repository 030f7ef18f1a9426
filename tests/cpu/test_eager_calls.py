"""Eager calls of attention on the CPU take the short way, and it has the results of the long one, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cpu_calls import MEMORY_LAYOUTS, differing, layouts, name_of, relaid_inputs, results
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import interformer_kernels as ik
from interformer_kernels.ops import _autograd, _eager, _registered
from interformer_kernels.testing import Case, make_inputs

pytest.importorskip("interformer_kernels._C", exc_type=ImportError)

OFFSETS = torch.tensor([0, 3, 3, 7])


def _tensors(requires_grad: bool = False) -> list[Tensor]:
    return [torch.randn(7, 2, 4, requires_grad=requires_grad) for _ in range(3)]


@pytest.fixture
def no_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that does not take the short way fails."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the long way")

    monkeypatch.setattr(_registered.RegisteredOp, "__call__", refuse)
    monkeypatch.setattr(_registered.RegisteredOp, "run_backward", refuse)


@pytest.mark.usefixtures("no_long_way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_plain_calls_take_the_short_way(dtype: torch.dtype) -> None:
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in _tensors())
    gate = torch.randn(7, 2, 1, dtype=dtype, requires_grad=True)
    residual = torch.randn(4, dtype=dtype, requires_grad=True)
    tables = torch.rand(4, 2), torch.rand(4, 2)
    options: dict[str, Any] = {"causal": True, "window": (2, 0), "scale": 0.3, "rope": tables}
    out, lse = ik.jagged_attention(q, k, v, OFFSETS, gate=gate, residual=residual, return_lse=True, **options)
    assert lse.shape == (7, 2)
    grads = torch.autograd.grad(out.sum(), (q, k, v, gate, residual))
    assert [x.shape for x in grads] == [x.shape for x in (q, k, v, gate, residual)]
    assert {x.dtype for x in grads} == {dtype}
    seeds, queries = torch.randn(2, 2, 4, dtype=dtype), torch.randn(3, 2, 2, 4, dtype=dtype)
    assert ik.pma_pooling(seeds, k, v, OFFSETS).shape == queries.shape
    assert ik.gated_cross_attention(queries, k, v, OFFSETS.int(), backend="cpu").shape == queries.shape


SIZES: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_size": 8, "value_size": 6, "gate": "head", "residual": True}
CASES = [
    *layouts((3, 0, 40), **SIZES),
    *layouts((3, 0, 40), **SIZES, grad_lse=True),
    *layouts((3, 0, 40), **SIZES, options={"score": "silu", "post_scale": 0.5, "scale": 0.3}),
    Case("jagged_attention", "masks", options={"causal": True, "window": (3, 0), "num_prefix": 2}),
    Case("jagged_attention", "rope", rope=8, strided=True),
    Case("jagged_attention", "interleaved rope", rope=6, options={"rope_interleaved": True}),
    Case("pma_pooling", "shared values", shared_value=True, options={"skip_prefix": 2}),
]


@pytest.mark.parametrize("case", CASES, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_both_ways_have_the_same_bits(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(case, dtype)
    for relaid in (inputs, *(relaid_inputs(inputs, layout) for layout in MEMORY_LAYOUTS)):
        short = results(case.op, relaid)
        with monkeypatch.context() as patched:
            patched.setattr(_autograd, "is_eager", lambda: False)
            assert not differing(short, results(case.op, relaid))


def _declined() -> dict[str, Callable[[], Any]]:
    """Calls that the long way has to serve or to refuse."""
    q, k, v = _tensors()
    sub = torch.randn(7, 2, 4).as_subclass(type("Marked", (Tensor,), {}))
    calls = {
        "subclass": lambda: ik.jagged_attention(sub, k, v, OFFSETS),
        "negated": lambda: ik.jagged_attention(torch._neg_view(q), k, v, OFFSETS),
        "negated gate": lambda: ik.jagged_attention(q, k, v, OFFSETS, gate=torch._neg_view(q)),
        "reference": lambda: ik.jagged_attention(q, k, v, OFFSETS, backend="reference"),
        "positions": lambda: ik.jagged_attention(
            q, k, v, OFFSETS, rope=(torch.ones(9, 2), torch.zeros(9, 2)), rope_positions=torch.arange(7)
        ),
        "int scale": lambda: ik.jagged_attention(q, k, v, OFFSETS, scale=1),
        "meta": lambda: ik.jagged_attention(*(x.to("meta") for x in (q, k, v)), OFFSETS.to("meta")),
        "vmap": lambda: torch.vmap(lambda x: ik.jagged_attention(x, k, v, OFFSETS))(q[None]),
        "func.grad": lambda: torch.func.grad(lambda x: ik.jagged_attention(x, k, v, OFFSETS).sum())(q),
    }

    def in_context(context: Any) -> Callable[[], Any]:
        def run() -> Any:
            with context:
                return ik.jagged_attention(q, k, v, OFFSETS)

        return run

    calls["autocast"] = in_context(torch.autocast("cpu", torch.bfloat16))
    calls["profiler"] = in_context(torch.autograd.profiler.profile())
    calls["mode"] = in_context(FlopCounterMode(display=False))
    return calls


@pytest.mark.parametrize("name", _declined())
def test_other_calls_are_declined(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[object] = []
    short = _eager.attention

    def watched(*args: Any) -> Any:
        result = short(*args)
        served.append(result)
        return result

    monkeypatch.setattr(_eager, "attention", watched)
    _declined()[name]()
    assert [x for x in served if x is not None] == []


BAD: dict[str, dict[str, Any]] = {
    "v": {"v": None},
    "order": {"offsets": torch.tensor([0, 4, 3, 7])},
    "end": {"offsets": torch.tensor([0, 3, 3, 8])},
    "kv_offsets": {"kv_offsets": torch.tensor([0, 7])},
    "heads": {"q": torch.randn(7, 3, 4)},
    "dtype": {"k": torch.randn(7, 2, 4, dtype=torch.float64)},
    "gate": {"gate": torch.randn(7, 2, 3)},
    "residual": {"residual": torch.randn(2, 7, 2, 4)},
    "scale": {"scale": float("nan")},
    "post_scale": {"post_scale": 2.0},
    "infinite": {"score": "relu", "post_scale": float("inf")},
    "causal": {"causal": 1},
    "num_prefix": {"num_prefix": -1},
    "rows": {"rope": (torch.ones(3, 2), torch.ones(3, 2))},
    "pair": {"rope": torch.ones(2, 9, 2)},
    "cos": {"rope": (torch.ones(9, 2, dtype=torch.float64), torch.ones(9, 2))},
    "sin": {"rope": (torch.ones(9, 2), torch.ones(9, 2, requires_grad=True))},
    "rope_positions": {"rope": (torch.ones(9, 2), torch.ones(9, 2)), "kv_offsets": OFFSETS},
    "rope_interleaved": {"rope": (torch.ones(9, 2), torch.ones(9, 2)), "rope_interleaved": 1},
    "lse": {"return_lse": "yes"},
    "backend": {"backend": "fpga"},
}


@pytest.mark.parametrize("name", BAD)
def test_the_long_way_has_the_words(name: str) -> None:
    q, k, v = _tensors()
    with pytest.raises((TypeError, ValueError), match="jagged_attention: "):
        ik.jagged_attention(**{"q": q, "k": k, "v": v, "offsets": OFFSETS, **BAD[name]})


def test_offsets_that_are_trusted() -> None:
    q, k, v = _tensors()
    before = ik.set_validation("off")
    try:
        assert ik.jagged_attention(q, k, v, torch.tensor([0, 4, 3, 9])).isfinite().all()
    finally:
        ik.set_validation(before)


def test_second_derivatives() -> None:
    q, k, v = (x.detach().double().requires_grad_() for x in _tensors())
    assert torch.autograd.gradgradcheck(lambda *x: ik.jagged_attention(*x, OFFSETS), (q, k, v))


@pytest.mark.usefixtures("no_long_way")
def test_a_gradient_of_the_log_sum_exp_takes_the_short_way() -> None:
    q, k, v = _tensors(requires_grad=True)
    out, lse = ik.jagged_attention(q, k, v, OFFSETS, return_lse=True)
    grads = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
    assert all(x.any() for x in grads)
    out, lse = ik.jagged_attention(q, k, v, OFFSETS, return_lse=True)
    assert [x is None for x in torch.autograd.grad(lse.sum(), (q, k, v), allow_unused=True)] == [False] * 3
