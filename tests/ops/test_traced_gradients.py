"""Exported and traced programs hold bare calls of the registered ops: those have all gradients, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from grid import backends
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import interformer_kernels as ik
from interformer_kernels import testing
from interformer_kernels.ops._public import ALL
from interformer_kernels.testing import Case, offsets_of

SMALL: dict[str, Any] = {"lengths": (2, 0, 3), "tail": 1, "heads": 2, "kv_heads": 1, "head_size": 4, "value_size": 3}
GATED: dict[str, Any] = {"gate": "full", "residual": True, **SMALL}
CASES = [
    Case("jagged_attention", "plain", **SMALL),
    Case("jagged_attention", "rotary window gate", rope=4, options={"window": (1, 1)}, **GATED),
    Case("jagged_attention", "silu", options={"score": "silu", "gate_form": "self"}, **GATED),
    Case("jagged_attention", "cross", query_lengths=(1, 2, 2), options={"causal": True}, **GATED),
    Case("pma_pooling", "gate", options={"skip_prefix": 1}, **{**GATED, "gate": "channel"}),
    Case("pma_pooling", "v is k", shared_value=True, **SMALL),
    Case("gated_cross_attention", "dense", **{**GATED, "gate": "scalar"}),
    Case("gated_cross_attention", "jagged", query_lengths=(2, 1, 0), **GATED),
    Case("apply_rotary", "some channels", rope=2, **SMALL),
    Case("jagged_softmax", "scores", **SMALL),
    Case("jagged_weighted_sum", "values", **SMALL),
    Case("personalized_ffn", "gelu", residual=True, options={"activation": "gelu"}, **SMALL),
]
EACH_OP = [next(case for case in CASES if case.op == op and case.name != "plain") for op in testing.OPS]
over_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.name}")
over_ops = pytest.mark.parametrize("case", EACH_OP, ids=lambda case: case.op)


class Call(nn.Module):
    """One call whose differentiable inputs are parameters, all made from others: a gradient lost on the way shows."""

    def __init__(self, case: Case, backend: str | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.op, self.backend = case.op, backend
        inputs = testing.make_inputs(case, dtype)
        self.names = [name for name in testing.DIFFERENTIABLE[case.op] if inputs.get(name) is not None]
        self.leaves = nn.ParameterDict({n: inputs.pop(n).detach().nan_to_num(0.5) for n in self.names})
        self.grad_out = inputs.pop("grad_out").nan_to_num(0.5)
        self.rope = inputs.pop("rope", None)
        self.others = inputs

    def forward(self, factor: Tensor) -> Tensor:
        made = {name: self.leaves[name] * factor.to(self.leaves[name].dtype) for name in self.names}
        rope = {} if self.rope is None else {"rope": self.rope}
        found: Tensor = getattr(ik, self.op)(**self.others, **rope, **made, backend=self.backend)
        return found


FACTOR = torch.tensor(1.5)


def gradients(module: Any, call: Call, factor: Tensor = FACTOR) -> dict[str, Tensor]:
    """A gradient of every parameter, by the name of the input."""
    parameters = {name.split(".")[-1]: value for name, value in module.named_parameters()}
    assert parameters.keys() == set(call.names)
    found = torch.autograd.grad(module(factor), list(parameters.values()), call.grad_out)
    return dict(zip(parameters, found, strict=True))


def exported(call: Call, strict: bool = False) -> torch.export.ExportedProgram:
    return torch.export.export(call, (torch.tensor(0.5),), strict=strict)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@over_cases
def test_an_exported_program_trains_as_its_module(case: Case, strict: bool, tmp_path: Path) -> None:
    """From a file, too: there the tensors are others, and nothing but the registered ops is known."""
    call = Call(case)
    wanted = gradients(call, call)
    program = exported(call, strict)
    torch.testing.assert_close(gradients(program.module(), call), wanted, rtol=0, atol=0)
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    torch.testing.assert_close(gradients(loaded, call), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@over_cases
def test_a_program_traced_without_gradients_has_them(case: Case, dtype: torch.dtype) -> None:
    """A tensor that the backward reads was not asked to be kept there."""
    call = Call(case, dtype=dtype)
    wanted = gradients(call, call)
    with torch.no_grad():
        program = exported(call)
    torch.testing.assert_close(gradients(program.module(), call), wanted, rtol=0, atol=0)


@over_ops
def test_a_compiled_program_trains(case: Case) -> None:
    torch._dynamo.reset()
    call = Call(case)
    compiled = torch.compile(exported(call).module(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, call), gradients(call, call))


@over_cases
def test_second_derivatives_of_a_program(case: Case) -> None:
    call = Call(case, dtype=torch.float64)
    module = exported(call).module()

    def second(run: Any) -> tuple[Tensor, ...]:
        leaves = [value for _, value in sorted(run.named_parameters(), key=lambda pair: pair[0].split(".")[-1])]
        leaves.append(call.grad_out.clone().requires_grad_())
        first = torch.autograd.grad(run(FACTOR), leaves[:-1], leaves[-1], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves, materialize_grads=True)

    torch.testing.assert_close(second(module), second(call))


def bare(call: Call) -> Any:
    """The call as the function of its leaves that `make_fx` finds: the forward alone, with nothing around the op."""
    parameters = {f"leaves.{name}": call.leaves[name].detach() for name in call.names}

    def run(*leaves: Tensor) -> Tensor:
        return torch.func.functional_call(call, dict(zip(parameters, leaves, strict=True)), (FACTOR,))

    graph = make_fx(run)(*parameters.values())
    assert any(
        node.target is getattr(torch.ops.interformer_kernels, f"{ALL[call.op].spec.name}_fwd").default
        for node in graph.graph.nodes
    )
    return run, graph, tuple(parameters.values())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@over_cases
def test_transforms_of_bare_calls(case: Case) -> None:
    """torch.func's grad, vjp and vmap, and autograd outside of them, nested."""
    call = Call(case, dtype=torch.float64)
    run, graph, leaves = bare(call)
    places = tuple(range(len(leaves)))

    def loss(function: Any) -> Any:
        return lambda *x: (function(*x) * call.grad_out).square().sum()

    wanted = torch.func.grad(loss(run), places)(*leaves)
    torch.testing.assert_close(torch.func.grad(loss(graph), places)(*leaves), wanted)
    out, pull = torch.func.vjp(graph, *leaves)
    torch.testing.assert_close(pull(2 * out * call.grad_out.square()), wanted)
    stacked = tuple(torch.stack((x, 2 * x)).requires_grad_() for x in leaves)
    alone = [torch.func.grad(loss(run), places)(*(x[i].detach() for x in stacked)) for i in range(2)]
    mapped = tuple(torch.stack(pair) for pair in zip(*alone, strict=True))
    inside = torch.func.vmap(torch.func.grad(loss(graph), places))(*(x.detach() for x in stacked))
    torch.testing.assert_close(inside, mapped)
    outside = torch.autograd.grad(torch.func.vmap(loss(graph))(*stacked).sum(), stacked)
    torch.testing.assert_close(outside, mapped)


@over_cases
def test_nested_gradients_of_bare_calls(case: Case) -> None:
    call = Call(case, dtype=torch.float64)
    run, graph, leaves = bare(call)
    places = tuple(range(len(leaves)))

    def norm(function: Any) -> Any:
        inner = torch.func.grad(lambda *x: (function(*x) * call.grad_out).square().sum(), places)
        return lambda *x: sum(g.square().sum() for g in inner(*x))

    wanted = torch.func.grad(norm(run), places)(*leaves)
    torch.testing.assert_close(torch.func.grad(norm(graph), places)(*leaves), wanted)


@over_cases
def test_a_traced_gradient_can_be_differentiated(case: Case) -> None:
    """A graph of forward and backward holds bare calls of both halves."""
    call = Call(case, dtype=torch.float64)
    run, _, leaves = bare(call)

    asked = tuple(x.detach().requires_grad_() for x in leaves)
    grad_out = call.grad_out.clone().requires_grad_()
    graph = make_fx(lambda grad_out, *x: torch.autograd.grad(run(*x), x, grad_out))(grad_out, *asked)
    assert any(
        node.target is getattr(torch.ops.interformer_kernels, f"{ALL[call.op].spec.name}_bwd").default
        for node in graph.graph.nodes
    )
    wanted = torch.autograd.grad(run(*asked), asked, grad_out, create_graph=True)
    found = graph(grad_out, *asked)
    torch.testing.assert_close(found, wanted)
    weights = [torch.randn_like(x) for x in leaves]
    second = [
        torch.autograd.grad(
            sum((g * w).sum() for g, w in zip(x, weights, strict=True)), (grad_out, *asked), materialize_grads=True
        )
        for x in (found, wanted)
    ]
    torch.testing.assert_close(*second)


@over_ops
def test_an_outer_level_may_want_what_an_inner_one_does_not(case: Case) -> None:
    """The inner gradient passes through the call, whose inputs depend on the outer variable alone."""
    call = Call(case, dtype=torch.float64)
    run, _, leaves = bare(call)

    def inner(y: Tensor, x: Tensor) -> Tensor:
        return (y * run(x * 1.0, *leaves[1:])).sum()

    def outer(x: Tensor) -> Tensor:
        return torch.func.grad(inner)(torch.ones((), dtype=torch.float64), x)

    wanted = torch.func.grad(lambda x: run(x, *leaves[1:]).sum())(leaves[0])
    torch.testing.assert_close(torch.func.grad(outer)(leaves[0]), wanted)


@over_ops
def test_autocast_around_a_program(case: Case) -> None:
    """The program's calls have fixed dtypes; autocast around it changes what is between them alone."""
    call = Call(case)
    program = exported(call).module()
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(program, call)
    torch.testing.assert_close(found, gradients(call, call), rtol=0, atol=0)


# ---------------------------------------------------------------- what has no gradient says so


def tables(grad: bool) -> tuple[Tensor, Tensor]:
    cos, sin = testing.rotary_tables(8, 4)
    return cos.requires_grad_(grad), sin


@pytest.mark.parametrize("backend", backends("jagged_attention"))
def test_rotary_tables_that_require_gradients_are_refused(backend: str) -> None:
    x, offsets = torch.randn(5, 2, 4, requires_grad=True), offsets_of((2, 3))
    for rope in (tables(True), tables(True)[::-1]):
        with pytest.raises(
            ValueError, match="^jagged_attention: rope's (cos|sin) must not require gradients.* detach it"
        ):
            ik.jagged_attention(x, x, x, offsets, rope=rope, backend=backend)
        with pytest.raises(ValueError, match="^apply_rotary: rope's (cos|sin) must not require gradients.* detach it"):
            ik.apply_rotary(x, offsets, rope, backend=backend)
    module = ik.nn.JaggedSelfAttention(8, 2, backend=backend)
    with pytest.raises(ValueError, match="must not require gradients"):
        module(torch.randn(5, 8), offsets=offsets, rope=tables(True))
    with torch.no_grad():  # nothing is lost
        ik.apply_rotary(x, offsets, tables(True), backend=backend)


def test_rotary_tables_of_bare_calls_that_require_gradients_are_refused() -> None:
    call = Call(next(case for case in EACH_OP if case.op == "apply_rotary"))
    x, offsets = call.leaves["x"], call.others["offsets"]
    rotate = torch.ops.interformer_kernels.apply_rotary_fwd
    cos, sin = (table.clone().requires_grad_() for table in call.rope)
    with pytest.raises(ValueError, match="apply_rotary: cos must not require gradients"):
        rotate(x, offsets, cos, sin, None, False, "apply_rotary", "")
    with pytest.raises(ValueError, match="must not require gradients"):
        torch.func.grad(lambda cos: ik.apply_rotary(x.detach(), offsets, (cos, sin.detach())).sum())(cos.detach())


def with_lse(op: str, x: Tensor, backend: str | None = None) -> tuple[Tensor, Tensor]:
    offsets, options = offsets_of((2, 3)), {"return_lse": True, "backend": backend}
    if op == "jagged_attention":
        found = ik.jagged_attention(x, x, x, offsets, **options)
    elif op == "pma_pooling":
        found = ik.pma_pooling(x[:2], x, None, offsets, **options)
    else:
        found = ik.gated_cross_attention(x[:4].unflatten(0, (2, 2)), x, x, offsets, **options)
    out, lse = found
    return out, lse


ATTENTION = ("jagged_attention", "pma_pooling", "gated_cross_attention")


class WithLse(nn.Module):
    def __init__(self, op: str) -> None:
        super().__init__()
        self.op = op

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return with_lse(self.op, x)


def _plain(op: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """`with_lse` in plain PyTorch, row by row."""
    outs, sums = [], []
    for row, keys in enumerate(x.split((2, 3))):
        q = {"jagged_attention": keys, "pma_pooling": x[:2]}.get(op, x[2 * row : 2 * row + 2])
        s = torch.einsum("nhd,lhd->nhl", q, keys) / 2
        outs.append(torch.einsum("nhl,lhd->nhd", s.softmax(-1), keys))
        sums.append(s.logsumexp(-1))
    join = torch.cat if op == "jagged_attention" else torch.stack
    return join(outs), join(sums)


LOSSES: dict[str, Any] = {
    "output alone": lambda out, lse: out.square().sum(),
    "lse alone": lambda out, lse: lse.square().mean(),
    "both": lambda out, lse: (out * lse.exp()[..., None]).sum(),
    "detached": lambda out, lse: (out.square() * (1 + lse.detach()[..., None])).sum(),
}


@pytest.mark.parametrize("way", ["reference", "cpu", "compiled", "exported", "traced"])
@pytest.mark.parametrize("op", ATTENTION)
def test_lse_has_a_gradient(op: str, way: str) -> None:
    """A gradient of the output, of lse, or of both is asked for."""
    x = torch.randn(5, 2, 4, requires_grad=True)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        return with_lse(op, x, None if way in ("compiled", "exported", "traced") else way)

    if way == "compiled":
        torch._dynamo.reset()
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    elif way == "exported":
        run = torch.export.export(WithLse(op), (x,)).module()
    elif way == "traced":
        run = make_fx(run)(x.detach())
    for loss in LOSSES.values():
        wanted = torch.autograd.grad(loss(*_plain(op, x)), x)
        torch.testing.assert_close(torch.autograd.grad(loss(*run(x)), x), wanted)


@pytest.mark.parametrize("op", ATTENTION)
def test_transforms_of_lse(op: str) -> None:
    """torch.func's grad, second derivatives, and reentrant checkpoints, which pass zeros where nobody asks."""
    x = torch.randn(5, 2, 4, dtype=torch.float64, requires_grad=True)
    for loss in LOSSES.values():
        (wanted,) = torch.autograd.grad(loss(*_plain(op, x)), x, create_graph=True)
        torch.testing.assert_close(torch.func.grad(lambda x, loss=loss: loss(*with_lse(op, x)))(x.detach()), wanted)
        (found,) = torch.autograd.grad(loss(*with_lse(op, x)), x, create_graph=True)
        second = [torch.autograd.grad(first.square().sum(), x)[0] for first in (found, wanted)]
        torch.testing.assert_close(*second)
        x.grad = None
        loss(*torch.utils.checkpoint.checkpoint(lambda x: with_lse(op, x), x, use_reentrant=True)).backward()
        torch.testing.assert_close(x.grad, wanted)
