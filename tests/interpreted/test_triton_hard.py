"""Values that are extreme, or not finite in one place, on Triton's kernels: where they go, and where they do not."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import index_views
import pytest
import torch
from every import EVERY
from grid import GPU_DTYPES, case_ids, gpu_dtypes
from torch import Tensor
from triton_calls import results

from interformer_kernels import testing
from interformer_kernels._launch import splits
from interformer_kernels.testing import Case, offsets_of

# Numpy warns of the interpreter's infinities.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
ATTENTION, POOLING, CROSS = "jagged_attention", "pma_pooling", "gated_cross_attention"

# ---------------------------------------------------------------- values that are not finite stay where they belong


def _case(*names: str, **sizes: Any) -> Case:
    return Case(*names, tail=0, **sizes)


# Rows that share a tile, and longer ones; heads that share a tile; splits of 32 keys.
CONTAINED = [
    _case(ATTENTION, "short", lengths=(3, 4, 2), heads=2, kv_heads=1, head_size=4, value_size=4),
    _case(ATTENTION, "gated", lengths=(3, 4, 35), heads=2, kv_heads=2, head_size=4, value_size=6, gate="full",
         residual=True, options={"causal": True}),
    _case(ATTENTION, "silu", lengths=(3, 4, 2), heads=2, kv_heads=1, head_size=4, gate="head",
         options={"score": "silu", "post_scale": 0.5, "window": (2, 2)}),
    _case(ATTENTION, "cross, rope", lengths=(3, 4, 20), query_lengths=(2, 5, 40), heads=1, kv_heads=1, head_size=4,
         rope=4, positions=True),
    _case(POOLING, "heads in a tile", lengths=(4, 6), heads=4, kv_heads=2, head_size=4, queries=2,
         gate="full", residual=True, options={"skip_prefix": 2}),
    _case(POOLING, "values are keys", lengths=(40, 6), heads=2, kv_heads=2, head_size=4, queries=1, shared_value=True),
    _case(CROSS, "split", lengths=(6, 70), heads=2, kv_heads=2, head_size=4, queries=1, gate="head"),
    _case(CROSS, "relu", lengths=(5, 6), heads=2, kv_heads=2, head_size=4, queries=2, options={"score": "relu"}),
    _case("apply_rotary", "rotary", lengths=(3, 4), heads=2, kv_heads=2, head_size=8, rope=6),
    _case("personalized_ffn", "ffn", lengths=(3, 4), head_size=4, value_size=4, residual=True,
         options={"activation": "gelu"}),
]  # fmt: skip
OF_QUERIES = {"q", "gate", "residual", "grad_out", "out", "lse", "dq", "dgate", "dresidual"}
ROW = 1  # The row that gets a value, under the last head of keys.


def _owners(case: Case, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Row and key/value head that own every place of an input, an output or a gradient; -1 where several share it."""
    rows, heads = torch.full(x.shape, -1), torch.full(x.shape, -1)
    name = name.removeprefix("d")
    if name in ("weight", "bias") or (name in OF_QUERIES and x.shape[0] == len(case.lengths)):
        rows = torch.arange(len(x)).view(-1, *[1] * (x.dim() - 1)).expand(x.shape)
    elif name != "seeds":
        lengths = case.query_lengths if name in OF_QUERIES and case.query_lengths else case.lengths
        row_of_token = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        rows = row_of_token.view(-1, *[1] * (x.dim() - 1)).expand(x.shape)
    if case.op != "personalized_ffn":
        axis = x.dim() - 1 if name == "lse" else x.dim() - 2
        q_per_kv = 1 if x.shape[axis] == case.kv_heads else case.heads // case.kv_heads
        shape = [x.shape[axis] if i == axis else 1 for i in range(x.dim())]
        heads = (torch.arange(x.shape[axis]) // q_per_kv).view(shape).expand(x.shape)
    return rows, heads


def _together(owners: tuple[Tensor, Tensor], row: int, head: int) -> Tensor:
    """Places that belong to the row and head, alone or shared with others."""
    pairs = zip(owners, (row, head), strict=True)
    return torch.stack([(owner == wanted) | (owner == -1) | (wanted == -1) for owner, wanted in pairs]).all(0)


def _place(case: Case, name: str, x: Tensor) -> tuple[int, ...]:
    """The last place of an input that belongs to the row and the head."""
    places = _together(_owners(case, name, x), ROW, -1 if case.op == "personalized_ffn" else case.kv_heads - 1)
    return tuple(places.nonzero()[-1].tolist())


PUT = [
    (i, name) for i, case in enumerate(CONTAINED) for name, x in testing.make_inputs(case, torch.float32).items()
    if isinstance(x, Tensor) and x.is_floating_point()
]  # fmt: skip
_BASE: dict[tuple[int, torch.dtype], tuple[dict[str, Any], dict[str, Tensor]]] = {}


def _base(i: int, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Inputs of a case, and its results."""
    if (i, dtype) not in _BASE:
        inputs = testing.make_inputs(CONTAINED[i], dtype)
        _BASE[i, dtype] = inputs, results(CONTAINED[i].op, inputs)
    return _BASE[i, dtype]


@pytest.mark.parametrize(("i", "name"), PUT, ids=[f"{CONTAINED[i].op}-{CONTAINED[i].name}-{name}" for i, name in PUT])
def test_what_is_not_finite_stays_where_it_belongs(i: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other rows, other heads and skipped keys keep their bits, and so do other tokens, where a query got the value.

    Only masks hide such values: where PyTorch's result is NaN, ours is not finite either.
    """
    monkeypatch.setattr(splits, "SPLIT_KV", 32)
    index = PUT.index((i, name))
    for dtype in gpu_dtypes(index):
        inputs, clean = _base(i, dtype)
        case = CONTAINED[i]
        at = _place(case, name, inputs[name])
        values = torch.nan, torch.inf, -torch.inf, torch.finfo(dtype).max
        for value in values if EVERY else (values[index // 3 % 4],):
            x = inputs[name].detach().clone()
            x[at] = value
            changed = {**inputs, name: x.requires_grad_(inputs[name].requires_grad)}
            row, head = (int(owner[at]) for owner in _owners(case, name, x))
            eager = testing.evaluate(lambda: testing.call_eager(case.op, changed), case.op, changed)  # noqa: B023
            for quantity, found in results(case.op, changed).items():
                free = _together(_owners(case, quantity, found), row, head)
                if quantity in ("dk", "dv"):
                    free[sum(case.lengths[:ROW]) :][: case.options.get("skip_prefix", 0)] = False
                if name in OF_QUERIES and quantity in OF_QUERIES:
                    mine = torch.zeros_like(found, dtype=torch.bool)
                    mine[at[: found.dim() - (quantity != "lse")]] = True
                    free &= mine
                same = (found == clean[quantity]) | free
                assert same.all(), (quantity, dtype, value, (~same).nonzero().tolist()[:3])
                if math.isfinite(value) or {"causal", "window"} & case.options.keys():
                    continue
                hidden = eager[quantity].isnan() & found.isfinite()
                assert not hidden.any(), (quantity, dtype, value, hidden.nonzero().tolist()[:3])


# ---------------------------------------------------------------- numbers that are large or small


def _of_ones(lengths: tuple[int, ...], value: float, dtype: torch.dtype, **given: Any) -> dict[str, Any]:
    """Self attention whose values are all the same number, and whose scores differ."""
    tokens = sum(lengths)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(tokens, 1, 4, generator=generator).to(dtype) for _ in range(2))
    return {
        "q": q,
        "k": k,
        "v": torch.full((tokens, 1, 4), value, dtype=dtype),
        "offsets": offsets_of(lengths),
        **given,
    }


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
def test_a_mean_is_no_larger_than_its_values(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights sum to 1: a mean of the largest number is that number, in short rows, long ones, packs and splits."""
    monkeypatch.setattr(splits, "SPLIT_KV", 32)
    largest = torch.finfo(dtype).max
    inputs = _of_ones((1, 4, 100), largest, dtype)
    seeds, offsets = inputs["q"][:2], inputs["offsets"]
    pooled = {"seeds": seeds.expand(2, 2, 4), "k": inputs["k"].expand(-1, 2, 4), "v": inputs["v"].expand(-1, 2, 4)}
    for op, given in ((ATTENTION, inputs), (POOLING, {**pooled, "offsets": offsets})):
        ones = testing.call(op, {**given, "v": torch.ones_like(given["v"])}, "reference")[0]
        budget = 2 * (ones.double() - 1).abs().max() + torch.finfo(dtype).eps
        for sign in (1, -1):
            out, _ = testing.call(op, {**given, "v": given["v"] * sign}, "triton")
            error = (out.double() * sign / largest - 1).abs().max()
            assert error <= budget, (op, sign)


def _scaled(name: str, factor: float) -> Any:
    """A maker of inputs that multiplies one of them by a factor."""

    def make(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
        inputs = testing.make_inputs(case, dtype, device, seed)
        x = (inputs[name].detach() * factor).requires_grad_()
        return {**inputs, name: x}

    return make


@pytest.mark.parametrize("factor", [1e-6, 1e-3, 30.0, 1e4])
@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "silu"])
def test_gates_near_zero_and_saturated(activation: str, factor: float) -> None:
    """Maps and their derivatives keep the budget of float32 where differences would cancel, and saturated."""
    case = _case(ATTENTION, "", lengths=(5, 3), heads=2, kv_heads=2, gate="full",
                 options={"gate_activation": activation})  # fmt: skip
    rows = testing.compare(case, "triton", torch.float32, make=_scaled("gate", factor), most_draws=4)
    assert rows  # Where derivatives are 0, few quantities have numbers to compare.
    assert not [row for row in rows if not row.ok]


@pytest.mark.parametrize("factor", [1e-6, 30.0, -30.0, 1e4])
@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
def test_activations_near_zero_and_saturated(activation: str, factor: float) -> None:
    """The same for the feed-forward, with all arguments of one sign."""

    def make(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
        inputs = testing.make_inputs(case, dtype, device, seed)
        x, weight = ((inputs[name].detach().abs() + 0.5).requires_grad_() for name in ("x", "weight"))
        return {**inputs, "x": x, "weight": (weight.detach() * factor / 16).requires_grad_()}

    case = _case("personalized_ffn", "", lengths=(20, 12), head_size=16, value_size=16, bias=False,
                 options={"activation": activation})  # fmt: skip
    rows = testing.compare(case, "triton", torch.float32, make=make, most_draws=2)
    assert rows
    assert not [row for row in rows if not row.ok]


# ---------------------------------------------------------------- confident and equal scores

CONFIDENT = [
    _case(ATTENTION, "two keys", lengths=(2,) * 8, query_lengths=(34, *(3,) * 7), heads=1, kv_heads=1, head_size=32),
    _case(ATTENTION, "long", lengths=(40,), heads=2, kv_heads=1, gate="full"),
    _case(POOLING, "few keys", lengths=(2, 17, 2, 1), heads=2, kv_heads=2, head_size=64),
    _case(CROSS, "long", lengths=(17, 60), heads=2, kv_heads=2, queries=4, head_size=64),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CONFIDENT, ids=[f"{case.op}-{case.name}" for case in CONFIDENT])
def test_a_confident_softmax(case: Case, dtype: torch.dtype) -> None:
    """With nearly one-hot probabilities, gradients of scores are small differences of large numbers."""
    case = dataclasses.replace(case, options={"scale": 20.0 * case.head_size**-0.5})
    rows = testing.compare(case, "triton", dtype, most_draws=4)
    assert {row.quantity for row in rows} >= {"out", "dseeds" if case.op == POOLING else "dq", "dk", "dv"}
    assert not [row for row in rows if not row.ok]


ALONE = [
    _case(POOLING, "", lengths=(1, 1), heads=2, kv_heads=2, queries=1, gate="full"),
    _case(ATTENTION, "", lengths=(1, 1), query_lengths=(34, 2), heads=1, kv_heads=1),
]


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize("case", ALONE, ids=[case.op for case in ALONE])
def test_one_key_is_not_moved(case: Case, dtype: torch.dtype) -> None:
    """The softmax of a single score is constant, so its gradient is exactly 0."""
    found = results(case.op, testing.make_inputs(case, dtype))
    assert not found["dk"].any()
    assert not found["dseeds" if case.op == POOLING else "dq"].any()


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e3, 3e4, 1e17])
@pytest.mark.parametrize("op", [POOLING, ATTENTION])
def test_equal_scores_of_a_million_and_more(op: str, size: float, dtype: torch.dtype) -> None:
    """Where the log-sum-exp has no digits left for the number of keys, probabilities are equal and sum to 1 still."""
    tokens = 40
    case = _case(op, "", lengths=(tokens,), heads=1, kv_heads=1, head_size=4, value_size=4, queries=2)
    inputs = testing.make_inputs(case, dtype)
    name = "q" if op == ATTENTION else "seeds"
    size = min(size, torch.finfo(dtype).max / 2)
    inputs |= {"k": torch.full_like(inputs["k"], size).requires_grad_(), "scale": 0.3}
    inputs[name] = torch.full_like(inputs[name], size).requires_grad_()
    found, grad, values = results(op, inputs), inputs["grad_out"].double(), inputs["v"].detach().double()
    wanted = grad.flatten(0, -3).sum(0)  # of [queries, heads, channels]
    error = (found["dv"].double() - wanted / tokens).abs().max() / (wanted.abs().max() / tokens)
    assert error <= 2 * torch.finfo(dtype).eps, error
    error = (found["out"].double() - values.mean(0)).abs().max() / values.abs().max()
    assert error <= 2 * torch.finfo(dtype).eps, error
    assert (found["lse"] / (1.2 * found["lse"].new_tensor(size).to(dtype).float() ** 2) - 1).abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize("scale", [-0.5, 0.0, 3.0, -3.0, 1e-35])
def test_scales_of_any_sign_and_size(scale: float, dtype: torch.dtype) -> None:
    """The softmax of 16 bits takes maxima of products, in whose order scores are where the scale is positive."""
    for case in (
        _case(ATTENTION, "", lengths=(40, 3), heads=2, kv_heads=1, options={"scale": scale, "causal": True}),
        _case(CROSS, "", lengths=(5, 40), heads=2, kv_heads=2, queries=3, options={"scale": scale}),
    ):
        rows = testing.compare(case, "triton", dtype, most_draws=4)
        assert rows
        assert not [row for row in rows if not row.ok]


def test_attention_outputs_beyond_float16() -> None:
    """A is 128 000, beyond float16, though the output behind its gate is within it."""
    tokens = 64
    k, v = torch.ones(tokens, 1, 16).half(), torch.full((tokens, 1, 16), 2000.0).half()
    gate = torch.full((1, 1, 1, 16), 0.25).half().requires_grad_()
    inputs = {"q": torch.ones(1, 1, 1, 16).half().requires_grad_(), "k": k.requires_grad_(), "v": v.requires_grad_()}
    inputs |= {"kv_offsets": offsets_of((tokens,)), "score": "relu", "scale": 1 / 16, "gate": gate}
    inputs |= {"gate_form": "self", "gate_activation": "sigmoid", "grad_out": torch.ones(1, 1, 1, 16).half()}
    for quantity, x in results(CROSS, inputs).items():
        assert x.isfinite().all(), quantity
        assert torch.equal(x, results(CROSS, inputs, "reference")[quantity]), quantity


def test_scores_of_minus_infinity() -> None:
    """A key with this score has probability 0; if all scores of a query are -inf, the result is NaN, as in PyTorch."""
    k = torch.ones(20, 1, 2)
    k[:19, 0, 0] = -torch.inf
    for lengths in ((20,), (3, 17), (19, 1)):
        q = torch.ones(20, 1, 2)
        given = {"q": q, "k": k, "v": torch.arange(40.0).view(20, 1, 2), "offsets": offsets_of(lengths)}
        found, wanted = (testing.call(ATTENTION, given, backend) for backend in ("triton", "reference"))
        for x, y in zip(found, wanted, strict=True):
            assert torch.equal(x.nan_to_num(), y.nan_to_num()), lengths
            assert torch.equal(x.isnan(), y.isnan()), lengths


# ---------------------------------------------------------------- index tensors of any stride


@pytest.mark.parametrize("case", index_views.CASES, ids=case_ids(index_views.CASES))
def test_strides_of_index_tensors(case: Case) -> None:
    for view, plain in index_views.pairs(testing.make_inputs(case, torch.float32)):
        found = results(case.op, view)
        for quantity, x in results(case.op, plain).items():
            assert torch.equal(found[quantity], x), quantity
