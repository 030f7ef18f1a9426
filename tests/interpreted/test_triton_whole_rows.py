"""The backward of rows of up to 128 tokens in one pass: which rows it takes, what it gives, what it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from every import EVERY, most_draws
from grid import case_ids
from guards import guarded, guarded_inputs
from triton_calls import results

import interformer_kernels as ik
from interformer_kernels import testing
from interformer_kernels._triton import _programs, _run
from interformer_kernels.testing import Case

ATTENTION = "jagged_attention"
# Either side of the limits of short rows, of half tiles, and of whole rows.
EDGES = (129, 128, 65, 64, 33, 32, 0, 1)
ONE_HEAD: dict[str, Any] = {"heads": 1, "kv_heads": 1}
CASES = [
    (Case(ATTENTION, "plain", lengths=EDGES, **ONE_HEAD), torch.bfloat16),
    (Case(ATTENTION, "grouped heads, causal", lengths=(70, 33, 20, 3), heads=3, kv_heads=1, strided=True,
          options={"causal": True}), torch.float16),
    (Case(ATTENTION, "window, prefix, gate", lengths=(64, 32, 97, 0), **ONE_HEAD, gate="head", residual=True,
          options={"window": (20, 3), "num_prefix": 2}), torch.bfloat16),
    (Case(ATTENTION, "cross", lengths=EDGES, query_lengths=(3, 129, 64, 0, 100, 33, 40, 66), **ONE_HEAD,
          options={"causal": True}), torch.float16),
    (Case(ATTENTION, "silu, odd sizes", lengths=(100, 40), head_size=7, value_size=10, **ONE_HEAD,
          options={"score": "silu", "post_scale": 0.125, "window": (30, 30)}), torch.bfloat16),
    (Case("gated_cross_attention", "jagged queries, wide", lengths=(64, 5, 33), query_lengths=(20, 40, 64), heads=2,
          kv_heads=2, head_size=32, value_size=24, gate="full"), torch.float16),
    (Case(ATTENTION, "confident", lengths=(90, 40), **ONE_HEAD, options={"scale": 5.0}), torch.bfloat16),
]  # fmt: skip
DTYPES = (torch.bfloat16, torch.float16)
each = pytest.mark.parametrize(("case", "dtype"), CASES, ids=case_ids([case for case, _ in CASES]))


@each
def test_error_is_within_the_budget(case: Case, dtype: torch.dtype) -> None:
    for kind in DTYPES if EVERY else (dtype,):
        rows = testing.compare(case, "triton", kind, make=guarded_inputs, most_draws=most_draws(2))
        assert {row.quantity for row in rows} >= {"dq", "dk", "dv"}
        assert not [row for row in rows if not row.ok]


@pytest.mark.parametrize("one_pass", [False, True])
def test_whole_rows_and_no_others(one_pass: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of rows of 33 to 128 tokens on their longer side are written by one kernel, and by no other."""
    start = _run.start

    def in_part(kernel: Any, grid: int, *arguments: Any, **named: Any) -> None:
        name = kernel.fn.__name__
        if ("backward" not in name and "grad" not in name) or name.endswith("_whole") == one_pass:
            start(kernel, grid, *arguments, **named)

    monkeypatch.setattr(_run, "start", in_part)
    keys, queries = (129, 128, 33, 32, 5, 2, 16), (3, 40, 1, 32, 33, 129, 16)
    case = Case(ATTENTION, "", lengths=keys, query_lengths=queries, tail=0, **ONE_HEAD)
    found = results(ATTENTION, guarded_inputs(case, torch.bfloat16))
    for quantity, lengths in (("dq", queries), ("dk", keys), ("dv", keys)):
        for row, k, q in zip(found[quantity].split(lengths), keys, queries, strict=True):
            assert row.isnan().any() != ((32 < max(k, q) <= 128) == one_pass), (quantity, k, q)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_see_the_others(dtype: torch.dtype) -> None:
    lengths = (65, 130, 3, 128, 40)
    case = Case(ATTENTION, "", lengths=lengths, tail=0, **ONE_HEAD, options={"num_prefix": 2, "window": (40, 0)})
    inputs = guarded_inputs(case, dtype)
    together = results(ATTENTION, inputs)
    for b in (0, 3, 4):
        for quantity, single in results(ATTENTION, testing.alone(inputs, lengths, b)).items():
            assert torch.equal(testing.row_of(together[quantity], lengths, b), single), (quantity, b)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("value", "dtype"), [("nan", torch.bfloat16), ("-inf", torch.float16), ("largest", torch.bfloat16)], ids=str
)
def test_what_is_not_finite_stays_where_it_belongs(value: str, dtype: torch.dtype) -> None:
    """Other rows, heads and queries keep their bits, though the row gets its softmax another way."""
    case = Case(ATTENTION, "", lengths=(35, 3, 70), heads=2, kv_heads=2, head_size=4, value_size=4, tail=0)
    inputs = testing.make_inputs(case, dtype)
    plants = [plant for plant in testing.plants(inputs) if plant.value == value]
    assert not testing.check_planted(case, "triton", inputs, plants if EVERY else plants[1::2])


@pytest.mark.parametrize("lengths", [(40, 20), (70, 3), (140, 20)], ids=["whole", "longer whole", "tiles"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_of_one_query(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    """Such queries get sums of their own, and the other queries keep their bits."""
    case = Case(ATTENTION, "", lengths=lengths, tail=0, heads=2, kv_heads=2, head_size=4, value_size=4,
                options={"scale": 30.0})  # fmt: skip
    inputs = testing.make_inputs(case, dtype)
    clean = results(ATTENTION, inputs)

    def make(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
        drawn = testing.make_inputs(case, dtype, device, seed)
        q = drawn["q"].detach().clone()
        q[[7, 35]] *= 100
        return {**drawn, "q": q.requires_grad_()}

    found = results(ATTENTION, make(case, dtype, "cpu", 0))
    others = [t for t in range(sum(lengths)) if t not in (7, 35)]
    assert found["lse"][[7, 35]].abs().min() > 1024
    assert torch.equal(found["dq"][others], clean["dq"][others])
    rows = testing.compare(case, "triton", dtype, make=make, most_draws=most_draws(2))
    assert not [row for row in rows if not row.ok]


@pytest.mark.parametrize(
    ("many_rows", "queries", "dtype"),
    [(10**6, None, torch.bfloat16), (10**6, (9, 40, 54), torch.float32), (0, None, torch.float32),
     (0, (9, 40, 54), torch.bfloat16)],
    ids=["searched, self", "searched, cross", "listed, self", "listed, cross"],
)  # fmt: skip
def test_disordered_offsets(
    many_rows: int, queries: tuple[int, ...] | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the offsets hold, every gradient is written, and nothing is read that is outside the tensors or was not
    written."""
    monkeypatch.setattr(_programs, "MANY_ROWS", many_rows)
    ik.set_validation("off")
    case = Case(ATTENTION, "", lengths=(60, 3, 40), query_lengths=queries, tail=0, **ONE_HEAD)
    inputs = guarded_inputs(case, dtype)
    for i, disordered in enumerate(([70, 2, 1000, -5], [0, 100, 5, 103], [3, 90, 60, 133], [0, 60, 60, 50])):
        name = "kv_offsets" if queries is not None and i % 2 else "offsets"
        for quantity, x in results(ATTENTION, {**inputs, name: guarded(torch.tensor(disordered))}).items():
            assert not x.isnan().any(), (quantity, name, disordered)


def test_nothing_is_launched_for_rows_that_are_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host knows the longest row, the backward starts nothing for longer ones, and gives the same bits."""
    case = Case(ATTENTION, "", lengths=(40, 128, 3), tail=0, **ONE_HEAD)
    inputs = guarded_inputs(case, torch.bfloat16)
    unknown = results(ATTENTION, inputs)
    start, started = _run.start, []

    def listed(kernel: Any, grid: int, *arguments: Any, **named: Any) -> None:
        if grid:
            started.append(kernel.fn.__name__)
        start(kernel, grid, *arguments, **named)

    plan = ik.plan(inputs["offsets"])
    monkeypatch.setattr(_run, "start", listed)
    known = results(ATTENTION, inputs)
    del plan
    # A launch for each range of lengths: up to 32, 64 and 128.
    assert [name for name in started if "backward" in name or "grad" in name] == [
        "attention_backward_short", "attention_backward_whole", "attention_backward_whole"
    ]  # fmt: skip
    for quantity, x in unknown.items():
        assert torch.equal(known[quantity], x), quantity


def test_without_a_plan_no_pass_makes_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass for dQ does it: a launch for each range of whole rows, dQ, dK with dV, and none to fill memory."""
    start, started = _run.start, []

    def listed(kernel: Any, grid: int, *arguments: Any, **named: Any) -> None:
        started.append(kernel.fn.__name__)
        start(kernel, grid, *arguments, **named)

    monkeypatch.setattr(_run, "start", listed)
    results(ATTENTION, guarded_inputs(Case(ATTENTION, "", lengths=(5, 40), **ONE_HEAD), torch.bfloat16))
    assert [name for name in started if "backward" in name or "grad" in name] == [
        "attention_grad_queries", "attention_grad_keys",
        "attention_backward_short", "attention_backward_whole", "attention_backward_whole",
    ]  # fmt: skip
