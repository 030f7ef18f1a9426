"""Folded pooling on the CPU: plain eager calls are one native call, as exact as pooling of projected tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from interformer_kernels import testing
from interformer_kernels.ops import pma_folded
from interformer_kernels.testing.budget import Sums

_C = pytest.importorskip("interformer_kernels._C", exc_type=ImportError)

NAMES = ("seeds", "key_weight", "value_weight", "value_bias", "x")
# Rows that share a chunk of tokens, that fill several, and empty ones; the sizes have a vector of queries or less, two,
# or more, and widths of whole vectors or not.
LENGTHS = (3, 0, 1, 1, 40, 2, 300, 0, 5, 7, 130, 4)
SIZES = {
    "one": (1, 1, 16, 16),
    "few": (2, 4, 16, 64),
    "vector": (4, 4, 16, 64),
    "odd": (3, 5, 3, 15),
    "pairs": (3, 2, 5, 10),
    "two vectors": (2, 10, 8, 80),
    "three vectors": (5, 9, 32, 48),
    "wide": (2, 2, 40, 200),
}


def make(name: str, dtype: torch.dtype, bias: bool = True, lengths: Sequence[int] = LENGTHS) -> dict[str, Any]:
    M, H, D, E = SIZES[name]
    numbers = testing.Numbers("cpu", 0)

    def leaf(*shape: int, scale: float = 1.0) -> Tensor:
        return (numbers.normal(shape) * scale).to(dtype).requires_grad_()

    return {
        "seeds": leaf(M, H, D),
        "key_weight": leaf(H * D, E, scale=E**-0.5),
        "value_weight": leaf(H * D, E, scale=E**-0.5),
        "value_bias": leaf(H * D) if bias else None,
        "x": leaf(sum(lengths) + 2, E),  # with a tail
        "offsets": testing.offsets_of(lengths),
    }


def pool(inputs: dict[str, Any], scale: float = 0.3, backend: str | None = None) -> Tensor:
    return pma_folded.pool_folded(**inputs, scale=scale, backend=backend)


def projected(inputs: dict[str, Any], scale: float = 0.3) -> Tensor:
    """The definition: every token projected, in eager PyTorch."""
    heads, x = inputs["seeds"].shape[1:], inputs["x"]
    k, v = ((x @ inputs[f"{name}_weight"].T).unflatten(1, heads) for name in ("key", "value"))
    if inputs["value_bias"] is not None:
        v = v + inputs["value_bias"].view(heads)
    arguments = {"seeds": inputs["seeds"], "k": k, "v": v, "offsets": inputs["offsets"], "scale": scale}
    return testing.call_eager("pma_pooling", arguments)[0]


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return testing.budget.cast_inputs(inputs, dtype)


def results(run: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    out = run(inputs)
    leaves = {name: inputs[name] for name in NAMES if inputs[name] is not None}
    grad_out = testing.Numbers("cpu", 1).normal(out.shape).to(out.dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), grad_out)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


@pytest.fixture
def natively(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that is composed of other ops fails."""

    def refuse(*_: Any) -> None:
        raise AssertionError("composed")

    monkeypatch.setattr(pma_folded, "_pool_composed", refuse)


@pytest.mark.usefixtures("natively")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_within_the_budget(name: str, dtype: torch.dtype) -> None:
    inputs = make(name, dtype)
    found = results(pool, inputs)
    truth = results(projected, cast(inputs, torch.float64))
    eager = results(projected, cast(inputs, torch.float32 if dtype == torch.float64 else dtype))
    rows = [Sums.of(x, eager[quantity], truth[quantity]).judged(quantity) for quantity, x in found.items()]
    assert [row for row in rows if row.share > 1 and row.quantity in ("out", "x")] == []
    assert [row for row in rows if row.error > 2 * row.budget] == []  # too few numbers for a sharper bound
    assert {x.dtype for x in found.values()} == {dtype}


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_any_scale(scale: float) -> None:
    inputs = make("few", torch.float64)
    torch.testing.assert_close(pool(inputs, scale), projected(inputs, scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["vector", "pairs", "three vectors"])
def test_a_rows_bits_are_its_own(name: str, dtype: torch.dtype) -> None:
    """Whatever its neighbours, the threads, and whether a backward follows."""
    inputs = make(name, dtype, lengths=LENGTHS * 20)
    with torch.no_grad():
        out = pool(inputs)
        before = torch.get_num_threads()
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(pool(inputs), out)
        torch.set_num_threads(before)
        bounds = inputs["offsets"].tolist()
        for row in range(len(LENGTHS)):
            alone = inputs["x"][bounds[row] : bounds[row + 1]]
            offsets = torch.tensor([0, len(alone)])
            assert torch.equal(pool({**inputs, "x": alone, "offsets": offsets})[0], out[row])
    assert torch.equal(pool(inputs).detach(), out)


@pytest.mark.usefixtures("natively")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(dtype: torch.dtype) -> None:
    inputs = make("vector", dtype)
    strided = {
        name: x if name == "offsets" else torch.stack([x.detach(), x.detach()], -1)[..., 0]
        for name, x in inputs.items()
    }
    turned = {**inputs, **{name: inputs[name].T.contiguous().T for name in ("key_weight", "value_weight")}}
    beside = {**inputs, "x": torch.cat([inputs["x"], inputs["x"]], 1)[:, : inputs["x"].shape[1]]}
    for changed in (strided, turned, beside):
        assert torch.equal(pool(changed), pool(inputs))


@pytest.mark.usefixtures("natively")
def test_values_that_are_not_finite_stay_in_their_row() -> None:
    inputs: dict[str, Any] = {name: x if x is None else x.detach() for name, x in make("vector", torch.float32).items()}
    out = pool(inputs)
    bounds = inputs["offsets"].tolist()
    for row, bad in ((4, float("nan")), (6, float("inf"))):
        x = inputs["x"].clone()
        x[bounds[row + 1] - 1] = bad
        changed = pool({**inputs, "x": x})
        others = torch.arange(len(LENGTHS)) != row
        assert torch.equal(changed[others], out[others])
        assert changed[row].isnan().all()
    large = pool({**inputs, "value_weight": torch.full_like(inputs["value_weight"], float("inf"))})
    assert (large[inputs["offsets"].diff() == 0] == 0).all()


@pytest.mark.usefixtures("natively")
@pytest.mark.parametrize("lengths", [(), (0, 0), (0,)])
def test_nothing_to_pool(lengths: tuple[int, ...]) -> None:
    inputs = make("few", torch.float32, lengths=lengths)
    out = pool({**inputs, "x": inputs["x"][:0]})
    assert out.shape == (len(lengths), 2, 4, 16)
    assert (out == 0).all()
    out.sum().backward()
    assert inputs["key_weight"].grad.isfinite().all()
    none = pool({**make("few", torch.float32), "seeds": torch.zeros(0, 4, 16)})
    assert none.shape == (len(LENGTHS), 0, 4, 16)


def test_derivatives() -> None:
    M, H, D, E = 2, 2, 2, 3
    shapes = (M, H, D), (H * D, E), (H * D, E), (H * D,), (6, E)
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    offsets = torch.tensor([0, 2, 2, 6])

    def run(*values: Tensor) -> Tensor:
        return pool({**dict(zip(NAMES, values, strict=True)), "offsets": offsets})

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("kept", [*NAMES, "none"])
def test_only_wanted_gradients_are_computed(kept: str) -> None:
    every = make("few", torch.float32)
    inputs = {name: x if name in (kept, "offsets") else x.detach() for name, x in every.items()}
    out = pool(inputs)
    assert out.requires_grad == (kept != "none")
    if kept != "none":
        (grad,) = torch.autograd.grad(out.square().sum(), inputs[kept])
        (wanted,) = torch.autograd.grad(pool(every).square().sum(), every[kept])
        torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("name", ["subclass", "negated", "autocast", "profiler", "func.grad", "reference"])
def test_other_calls_are_composed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[object] = []
    native = pma_folded._pool_natively

    def watched(*args: Any) -> Any:
        served.append(native(*args))
        return served[-1]

    monkeypatch.setattr(pma_folded, "_pool_natively", watched)
    inputs = make("few", torch.float32)
    wanted, x = pool(inputs), inputs["x"]
    assert served.pop() is not None
    context: Any = contextlib.nullcontext()
    if name == "subclass":
        inputs["x"] = x.detach().as_subclass(type("Marked", (Tensor,), {}))
    elif name == "negated":
        inputs["x"] = torch._neg_view(-x)
    elif name == "autocast":
        context = torch.autocast("cpu", torch.bfloat16)
    elif name == "profiler":
        context = torch.autograd.profiler.profile()
    with context:
        if name == "func.grad":
            torch.func.grad(lambda x: pool({**inputs, "x": x}).sum())(x)
        else:
            out = pool(inputs, backend="reference" if name == "reference" else None)
            tolerance = 0.05 if name == "autocast" else 1e-5
            torch.testing.assert_close(torch.Tensor(out.float()), wanted, atol=tolerance, rtol=tolerance)
    assert served == [None]


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"offsets": torch.tensor([0, 4, 3])}, ValueError),
        ({"offsets": torch.tensor([0, 10_000])}, ValueError),
        ({"offsets": torch.zeros(3)}, TypeError),
        ({"x": torch.zeros(500, 63)}, (ValueError, RuntimeError)),
        ({"x": torch.zeros(500, 64, dtype=torch.float64)}, (TypeError, RuntimeError)),
    ],
)
def test_wrong_tensors_are_refused(changed: dict[str, Any], error: Any) -> None:
    with pytest.raises(error):
        pool({**make("few", torch.float32), **changed})


def test_wrong_options_are_refused() -> None:
    inputs = make("few", torch.float32)
    with pytest.raises(ValueError, match="scale"):
        pool(inputs, float("nan"))
    with pytest.raises(ValueError, match="backend"):
        pool(inputs, backend="fpga")


def test_compiled_programs_take_any_rows() -> None:
    inputs = {name: x.detach() for name, x in make("few", torch.float32).items()}
    compiled = torch.compile(pool, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(inputs), pool(inputs))
