"""`fused_linear`: what the shared cases of parity, registration and determinism do not ask of an op without rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from grid import TOKEN_CASES, backends, case_ids
from torch import Tensor

from interformer_kernels import fused_linear, testing
from interformer_kernels.testing import Case

EVERYTHING: dict[str, Any] = {"norm": True, "gate": "full", "residual": True, "tail": 0}
BACKENDS = backends("fused_linear")


def inputs_of(tokens: int, dtype: torch.dtype = torch.float32, **sizes: Any) -> dict[str, Any]:
    case = Case("fused_linear", "", lengths=(tokens,), options={"activation": "silu"}, **{**EVERYTHING, **sizes})
    return testing.make_inputs(case, dtype)


def results(inputs: dict[str, Any], backend: str | None) -> dict[str, Tensor]:
    return testing.evaluate(lambda: testing.call("fused_linear", inputs, backend), "fused_linear", inputs)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_definition_is_the_formula() -> None:
    made = inputs_of(9, torch.float64)
    x, weight, gate = made["x"], made["weight"], made["gate"]
    centred = x - x.mean(1, keepdim=True)
    normed = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * made["norm_weight"] + made["norm_bias"]
    wanted = (normed * torch.sigmoid(normed) * gate) @ weight.T + made["bias"] + made["residual"]
    torch.testing.assert_close(testing.call("fused_linear", made, "reference")[0], wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_derivatives(backend: str) -> None:
    made = inputs_of(5, torch.float64, head_size=6, value_size=3)
    names = testing.DIFFERENTIABLE["fused_linear"]

    def run(*values: Tensor) -> Tensor:
        return fused_linear(**dict(zip(names, values, strict=True)), activation="silu", backend=backend)

    values = tuple(made[name] for name in names)
    assert torch.autograd.gradcheck(run, values)
    assert torch.autograd.gradgradcheck(run, values)


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_any_number_of_threads(dtype: torch.dtype) -> None:
    made = inputs_of(5000, dtype, head_size=24, value_size=40)
    torch.set_num_threads(1)
    wanted = results(made, "cpu")
    for threads in (2, 3):
        torch.set_num_threads(threads)
        found = results(made, "cpu")
        assert all(torch.equal(found[name], x) for name, x in wanted.items())


def test_a_token_has_the_same_bits_in_any_batch() -> None:
    made = inputs_of(500, head_size=24, value_size=40)
    whole = results(made, "cpu")
    for first, last in ((0, 1), (7, 9), (95, 97), (100, 300)):
        of_tokens = {name: made[name][first:last] for name in ("x", "gate", "residual", "grad_out")}
        leaves = {name: x.detach().requires_grad_(name != "grad_out") for name, x in of_tokens.items()}
        found = results({**made, **leaves}, "cpu")
        for name in ("out", "dx", "dgate", "dresidual"):
            assert torch.equal(found[name], whole[name][first:last]), name


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the native module")
@pytest.mark.parametrize("case", TOKEN_CASES, ids=case_ids(TOKEN_CASES))
def test_calls_without_gradients_have_the_bits_of_those_with(case: Case) -> None:
    """They take one native call, which declines what it does not serve."""
    made = {name: x for name, x in testing.make_inputs(case, torch.float32).items() if name != "grad_out"}
    wanted = fused_linear(**made)
    assert wanted.requires_grad
    with torch.no_grad():
        assert torch.equal(fused_linear(**made), wanted)
        assert torch.equal(fused_linear(**{**made, "x": made["x"].neg()._neg_view()}), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_stay_with_their_token(backend: str, value: float) -> None:
    made = inputs_of(30)
    clean = results(made, backend)
    for name in ("x", "gate", "residual"):
        planted = made[name].detach().clone()
        planted[11, 3] = value
        found = results({**made, name: planted.requires_grad_()}, backend)
        others = torch.arange(30) != 11
        for quantity in ("out", "dx", "dgate"):
            assert torch.equal(found[quantity][others], clean[quantity][others]), (name, quantity)
        assert not found["out"][11].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(0, 5, 3), (4, 0, 3), (4, 5, 0)])
def test_axes_without_numbers(backend: str, tokens: int, inputs: int, outputs: int) -> None:
    made = inputs_of(tokens, head_size=inputs, value_size=outputs, norm=False)
    found = results(made, backend)
    assert found["out"].shape == (tokens, outputs)
    for name in ("x", "weight", "bias", "gate", "residual"):
        assert found[f"d{name}"].shape == made[name].shape
    if not tokens:
        assert not found["dweight"].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_and_broadcasts(backend: str) -> None:
    """Transposed and broadcast tensors, and a residual of one row, give the numbers of their copies."""
    made = inputs_of(33, head_size=16, value_size=32)
    given = {name: made[name].detach() for name in ("x", "weight", "gate", "bias")}
    wanted = fused_linear(**given, residual=made["residual"][:1].expand(33, -1).contiguous(), backend=backend)
    given["x"], given["weight"] = given["x"].T.contiguous().T, given["weight"].T.contiguous().T
    found = fused_linear(**given, residual=made["residual"][0], backend=backend)
    torch.testing.assert_close(found, wanted)
    strided = given["gate"].repeat_interleave(2, 1)[:, ::2]
    torch.testing.assert_close(
        fused_linear(**{**given, "gate": strided}, backend=backend), fused_linear(**given, backend=backend)
    )


def test_compiled_and_exported_programs() -> None:
    made = inputs_of(12)
    arguments = {name: x for name, x in made.items() if name != "grad_out"}
    leaves = [arguments[name] for name in testing.DIFFERENTIABLE["fused_linear"]]
    wanted = torch.autograd.grad(fused_linear(**arguments), leaves, made["grad_out"])
    torch._dynamo.reset()
    compiled = torch.compile(fused_linear, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(**arguments), leaves, made["grad_out"]), wanted)

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, norm: Tensor) -> Tensor:
            return fused_linear(x, weight, norm_weight=norm)

    x, weight, norm = (made[name].detach() for name in ("x", "weight", "norm_weight"))
    tokens = torch.export.Dim("T", min=1, max=100)
    program = torch.export.export(Layer(), (x, weight, norm), dynamic_shapes=({0: tokens}, None, None))
    torch.testing.assert_close(program.module()(x[:5], weight, norm), fused_linear(x[:5], weight, norm_weight=norm))


def test_autocast_and_meta() -> None:
    x, weight = torch.randn(6, 8), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_linear(x, weight).dtype == torch.bfloat16
    out = fused_linear(x.to("meta"), weight.to("meta"), activation="relu")
    assert out.shape == (6, 4)
    assert out.is_meta


def test_the_layers_of_pytorch() -> None:
    x, norm, linear = torch.randn(50, 64), torch.nn.LayerNorm(64), torch.nn.Linear(64, 192)
    out = fused_linear(x, linear.weight, linear.bias, norm_weight=norm.weight, norm_bias=norm.bias, eps=norm.eps)
    torch.testing.assert_close(out, linear(norm(x)))
    torch.testing.assert_close(fused_linear(x, linear.weight, activation="gelu"), F.linear(F.gelu(x), linear.weight))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": torch.zeros(3, 2, 8)}, ValueError, r"x must be \[T, E\], found shape \[3, 2, 8\]"),
        ({"weight": torch.zeros(4, 7)}, ValueError, r"weight must be \[F, E\] with E = 8, found shape \[4, 7\]"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias must be \[F\] with F = 4, found shape \[5\]"),
        ({"gate": torch.zeros(3, 1)}, ValueError, r"gate must be \[T, E\]"),
        ({"norm_weight": torch.zeros(4)}, ValueError, r"norm_weight must be \[E\] with E = 8"),
        ({"norm_bias": torch.zeros(8)}, ValueError, "norm_weight must be given with norm_bias, found None"),
        ({"eps": -1.0}, ValueError, "eps must be at least 0, found -1.0"),
        ({"activation": "swish"}, ValueError, "activation must be one of"),
        ({"residual": torch.zeros(3, 5)}, ValueError, "residual must"),
        ({"weight": torch.zeros(4, 8, dtype=torch.float64)}, TypeError, "weight must have x's dtype torch.float32"),
        ({"backend": "cuda"}, RuntimeError, "backend 'cuda' cannot serve: it has no kernel for this op"),
        ({"backend": "triton"}, RuntimeError, "backend 'triton' cannot serve: it has no kernel for this op"),
    ],
    ids=str,
)
def test_errors_name_the_argument(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments = {"x": torch.zeros(3, 8), "weight": torch.zeros(4, 8), **changes}
    with pytest.raises(error, match=f"fused_linear: .*{words}"):
        fused_linear(**arguments)
