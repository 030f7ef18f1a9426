"""Gradients: first and second derivatives against finite differences, and the rules around them."""

from __future__ import annotations

import pytest
import torch
from grid import backends, over_cases
from torch import Tensor

import interformer_kernels as ik
from interformer_kernels import testing
from interformer_kernels.testing import Case, offsets_of

SMALL = {"lengths": (2, 0, 3), "tail": 1, "heads": 2, "kv_heads": 1, "head_size": 4, "value_size": 3, "queries": 2}
DERIVED = [
    Case(
        "jagged_attention",
        "rotary window gate",
        rope=4,
        gate="head",
        residual=True,
        options={"window": (1, 1)},
        **SMALL,
    ),
    Case("jagged_attention", "silu self-gate", gate="full", options={"score": "silu", "gate_form": "self"}, **SMALL),
    Case("jagged_attention", "lse", rope=4, grad_lse=True, options={"window": (1, 1)}, **SMALL),
    Case("jagged_attention", "cross causal", query_lengths=(1, 2, 2), options={"causal": True}, **SMALL),
    Case("pma_pooling", "gate residual", gate="channel", residual=True, options={"skip_prefix": 1}, **SMALL),
    Case("pma_pooling", "lse", gate="full", grad_lse=True, **SMALL),
    Case("pma_pooling", "v is k, gelu", shared_value=True, options={"score": "gelu"}, **SMALL),
    Case("gated_cross_attention", "dense", gate="scalar", options={"gate_activation": "tanh"}, **SMALL),
    Case("gated_cross_attention", "jagged", query_lengths=(2, 1, 0), gate="full", residual=True, **SMALL),
    Case("gated_cross_attention", "lse", residual=True, grad_lse=True, **SMALL),
    Case("apply_rotary", "some channels", rope=2, **SMALL),
    Case("jagged_softmax", "scores", **SMALL),
    Case("jagged_weighted_sum", "values", **SMALL),
    Case("personalized_ffn", "gelu", residual=True, options={"activation": "gelu"}, **SMALL),
]


def call_of(case: Case, backend: str) -> tuple[object, tuple[Tensor, ...]]:
    """The case as a function of its gradient leaves, in float64 and without NaN in the tail (finite differences); with
    the output goes the log-sum-exp of queries that see something, if it has a gradient."""
    inputs = testing.make_inputs(case, torch.float64)
    names = [n for n in testing.DIFFERENTIABLE[case.op] if inputs.get(n) is not None]
    leaves = tuple(inputs[n].detach().nan_to_num(0.5).requires_grad_() for n in names)

    def run(*values: Tensor) -> Tensor:
        out, lse = testing.call(case.op, {**inputs, **dict(zip(names, values, strict=True))}, backend)
        if not case.grad_lse or lse is None:
            return out
        return torch.cat((out, lse.masked_fill(lse == -torch.inf, 0)[..., None]), -1)

    return run, leaves


@over_cases(DERIVED)
def test_gradcheck(backend: str, case: Case) -> None:
    run, leaves = call_of(case, backend)
    assert torch.autograd.gradcheck(run, leaves)


@over_cases(DERIVED)
def test_gradgradcheck(backend: str, case: Case) -> None:
    run, leaves = call_of(case, backend)
    assert torch.autograd.gradgradcheck(run, leaves)


@over_cases(DERIVED)
def test_only_wanted_gradients_are_made(backend: str, case: Case) -> None:
    """Each leaf alone gets the gradient it gets among all."""
    run, leaves = call_of(case, backend)
    together = torch.autograd.grad(run(*leaves).sum(), leaves)
    for i, wanted in enumerate(together):
        alone = [x.detach().requires_grad_(i == j) for j, x in enumerate(leaves)]
        run(*alone).sum().backward()
        torch.testing.assert_close(alone[i].grad, wanted, rtol=0, atol=0)
        assert all(x.grad is None for j, x in enumerate(alone) if j != i)


@pytest.mark.parametrize("backend", backends("pma_pooling"))
def test_gate_gradient_is_summed_over_broadcast_axes(backend: str) -> None:
    case = Case("pma_pooling", "", gate="full", **SMALL)
    inputs = testing.make_inputs(case, torch.float32)
    one = torch.tensor(0.3)
    inputs["gate"] = one.expand_as(inputs["gate"]).clone().requires_grad_()
    full = testing.evaluate(lambda: testing.call(case.op, inputs, backend), case.op, inputs)["dgate"]
    for shape in ((), (1, 1, 1, 1), (2, 3), (2, 1), (3, 2, 2, 1)):
        inputs["gate"] = one.expand(shape).clone().requires_grad_()
        found = testing.evaluate(lambda: testing.call(case.op, inputs, backend), case.op, inputs)["dgate"]
        torch.testing.assert_close(found, full.sum_to_size(shape))


ALL_EMPTY = [Case(op, "all empty", lengths=(0, 0), gate="full", residual=True, rope=4) for op in testing.OPS]


@over_cases(ALL_EMPTY)
def test_empty_rows_give_finite_gradients(backend: str, case: Case) -> None:
    """All rows empty: outputs and gradients are finite (lse is -inf)."""
    inputs = testing.make_inputs(case, torch.float32)
    found = testing.evaluate(lambda: testing.call(case.op, inputs, backend), case.op, inputs)
    for name, x in found.items():
        assert x.isfinite().all() or name == "lse", name


def test_grad_out_in_the_tail_is_not_read() -> None:
    """NaN gradients of tail outputs reach nothing, a residual included."""
    q = torch.randn(6, 1, 4, requires_grad=True)
    residual, gate = torch.randn(6, 1, 4, requires_grad=True), torch.randn((), requires_grad=True)
    for backend in backends("jagged_attention"):
        out = ik.jagged_attention(q, q, q, offsets_of((2, 2)), residual=residual, gate=gate, backend=backend)
        grad_out = torch.ones_like(out)
        grad_out[4:] = torch.nan
        for grad in torch.autograd.grad(out, (q, residual, gate), grad_out):
            assert grad.isfinite().all()


@pytest.mark.parametrize("backend", backends("jagged_attention"))
def test_the_gradient_of_lse_where_a_query_sees_nothing_is_not_read(backend: str) -> None:
    """On the tail, in rows without keys, and behind masks."""
    q, k = torch.randn(7, 2, 4, requires_grad=True), torch.randn(4, 1, 4, requires_grad=True)
    rows = {"offsets": offsets_of((2, 3, 1)), "kv_offsets": offsets_of((1, 0, 2)), "causal": True, "backend": backend}
    for nothing in (torch.nan, torch.inf):
        out, lse = ik.jagged_attention(q, k, k, **rows, return_lse=True)
        sees = lse != -torch.inf
        assert sees[:, 0].tolist() == [False, True, False, False, False, True, False]
        given = torch.randn_like(lse).where(sees, nothing)
        found = torch.autograd.grad((out, lse), (q, k), (torch.ones_like(out), given))
        again = ik.jagged_attention(q, k, k, **rows, return_lse=True)
        clean = torch.autograd.grad(again, (q, k), (torch.ones_like(out), given.where(sees, 0)))
        for x, wanted in zip(found, clean, strict=True):
            assert torch.equal(x, wanted)
        assert not found[0][~sees].any()


def _loss(backend: str, *qkv: Tensor) -> Tensor:
    out = ik.jagged_attention(*qkv, offsets_of((2, 4)), backend=backend)
    assert isinstance(out, Tensor)
    return out.square().sum()


@pytest.mark.parametrize("made", ["one tensor", "one from the other"])
@pytest.mark.parametrize("backend", backends("jagged_attention"))
def test_arguments_that_depend_on_each_other(backend: str, made: str) -> None:
    """Each place of a tensor counts once, also in gradients that are differentiable themselves."""
    x = torch.randn(6, 2, 4, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return _loss(backend, x, x, x) if made == "one tensor" else _loss(backend, x, 2 * x, x.tanh())

    (first,) = torch.autograd.grad(run(x), x)
    (differentiable,) = torch.autograd.grad(run(x), x, create_graph=True)
    torch.testing.assert_close(differentiable, first)
    assert torch.autograd.gradgradcheck(run, (x,))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("backend", backends("jagged_attention"))
def test_functional_transforms(backend: str) -> None:
    """torch.func: reverse mode, nested and mapped, gives autograd's gradients; forward mode is refused."""
    x = torch.randn(3, 6, 2, 4, dtype=torch.float64)

    def run(x: Tensor) -> Tensor:
        return _loss(backend, x, x, x)

    def norm(x: Tensor) -> Tensor:
        return torch.func.grad(run)(x).square().sum()

    leaf = x[0].clone().requires_grad_()
    (first,) = torch.autograd.grad(run(leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), leaf)
    torch.testing.assert_close(torch.func.grad(run)(x[0]), first.detach())
    torch.testing.assert_close(torch.func.vjp(run, x[0])[1](torch.ones((), dtype=x.dtype))[0], first.detach())
    torch.testing.assert_close(torch.func.jacrev(run)(x[0]), first.detach())
    torch.testing.assert_close(torch.func.grad(norm)(x[0]), second)
    torch.testing.assert_close(torch.func.vmap(run)(x), torch.stack([run(one) for one in x]))
    alone = torch.stack([torch.func.grad(run)(one) for one in x])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(run))(x), alone)
    with pytest.raises(NotImplementedError, match="jagged_attention has no forward-mode derivative"):
        torch.func.jvp(run, (x[0],), (x[0],))


MAPPED = [
    Case(op, "mapped", gate="" if op in ("apply_rotary", "personalized_ffn") else "full", rope=4, residual=True)
    for op in testing.OPS
]
MAPPED.append(Case("pma_pooling", "mapped, lse", grad_lse=True, tail=0))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@over_cases(MAPPED)
def test_vmap(backend: str, case: Case) -> None:
    """Mapped calls are the calls one by one, and so are gradients taken inside and outside."""
    run, leaves = call_of(case, backend)
    stacked = [torch.stack((x, x.flip(0))).detach().requires_grad_() for x in leaves]
    expected = torch.stack([run(*(x[i] for x in stacked)) for i in range(2)])
    mapped = torch.func.vmap(run)(*stacked)
    torch.testing.assert_close(mapped, expected)
    wanted = torch.autograd.grad(expected.square().sum(), stacked)
    torch.testing.assert_close(torch.autograd.grad(mapped.square().sum(), stacked), wanted)
    inside = torch.func.grad(lambda *x: run(*x).square().sum(), argnums=tuple(range(len(leaves))))
    torch.testing.assert_close(torch.func.vmap(inside)(*(x.detach() for x in stacked)), wanted)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("backend", backends("jagged_attention"))
def test_vmap_over_offsets(backend: str) -> None:
    x, offsets = torch.randn(2, 6, 2, 4, requires_grad=True), torch.stack((offsets_of((2, 4)), offsets_of((5, 1))))
    mapped = torch.func.vmap(lambda x, offsets: ik.jagged_attention(x, x, x, offsets, backend=backend))(x, offsets)
    expected = torch.stack([ik.jagged_attention(x[i], x[i], x[i], offsets[i], backend=backend) for i in range(2)])
    torch.testing.assert_close(mapped, expected)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(torch.autograd.grad(mapped.square().sum(), x)[0], wanted)
