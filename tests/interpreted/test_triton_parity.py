"""Every case of every op on Triton's kernels, within the budget of rounding; with EVERY=1 in every dtype, all draws.

Otherwise each case runs in one dtype in rotation, and a few that take every path of the kernels run in all dtypes; with
at most two heads of keys, since the interpreter is slow. A few cases run with all their draws.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from every import EVERY, most_draws
from grid import ALL_CASES, case_ids, in_turn
from guards import guarded_inputs
from triton_calls import results

from interformer_kernels import testing
from interformer_kernels._launch import splits
from interformer_kernels._triton import _run
from interformer_kernels.testing import Case


def small(case: Case) -> Case:
    """With at most two heads of keys, and as many of queries for each as before."""
    kv_heads = case.kv_heads if EVERY else min(case.kv_heads, 2)
    return dataclasses.replace(case, heads=case.heads // case.kv_heads * kv_heads, kv_heads=kv_heads)


PAIRS = [pytest.param(small(case), dtype, id=name) for case, dtype, name in in_turn(ALL_CASES)]

# Cases whose every quantity is compared in CI, too: each has at least 64 numbers in a draw.
WHOLE = [
    (Case("jagged_attention", "whole", gate="channel", heads=2, kv_heads=1, head_size=64, value_size=64,
          lengths=(64, 3, 0, 33), options={"causal": True}), torch.bfloat16),
    (Case("pma_pooling", "whole", gate="channel", heads=4, kv_heads=2, lengths=(40, 0, 5)), torch.float16),
    (Case("gated_cross_attention", "whole", gate="head", residual=True, lengths=(40, 0, 5)), torch.float32),
    (Case("personalized_ffn", "whole", head_size=24, value_size=48, residual=True), torch.bfloat16),
]  # fmt: skip


@pytest.mark.parametrize(("case", "dtype"), PAIRS)
def test_error_is_within_the_budget(case: Case, dtype: torch.dtype) -> None:
    rows = testing.compare(case, "triton", dtype, make=guarded_inputs, most_draws=most_draws(2))
    assert not [row for row in rows if not row.ok]


@pytest.mark.parametrize(("case", "dtype"), WHOLE, ids=[case.op for case, _ in WHOLE])
def test_every_quantity_is_within_the_budget(case: Case, dtype: torch.dtype) -> None:
    rows = testing.compare(case, "triton", dtype, make=guarded_inputs)
    assert {row.quantity for row in rows} == results(case.op, guarded_inputs(case, dtype)).keys()
    assert not [row for row in rows if not row.ok]


ATTENTION, POOLING = "jagged_attention", "pma_pooling"
# Kernels that write outputs and gradients of tokens.
ATTENDING = {
    "attention_forward", "attention_grad_queries", "attention_grad_keys",
    "attention_forward_short", "attention_backward_short", "attention_backward_whole",
}  # fmt: skip
# Head sizes that are no powers of two, wide ones, and unequal ones; few queries of many heads.
SIZES = [
    (Case(ATTENTION, "wide", lengths=(3, 70), heads=1, kv_heads=1, head_size=96, value_size=256), torch.float32),
    (Case(ATTENTION, "widest", lengths=(20,), heads=2, kv_heads=1, head_size=256, value_size=4), torch.bfloat16),
    (Case(POOLING, "many heads", lengths=(9, 0, 40), heads=16, kv_heads=8, queries=1, head_size=4), torch.float32),
    (Case(POOLING, "odd q_per_kv", lengths=(9, 2), heads=6, kv_heads=2, queries=2, shared_value=True), torch.float16),
    (Case("gated_cross_attention", "odd pack", heads=12, kv_heads=12, queries=1, lengths=(5, 33)), torch.bfloat16),
    (Case(ATTENTION, "tiny rows", lengths=(16, 17, 1, 0, 15, 2), heads=4, kv_heads=2, head_size=7, value_size=10,
          gate="full", residual=True, options={"window": (5, 2), "num_prefix": 2}), torch.float32),
    (Case(ATTENTION, "tiny rows, causal", lengths=(31, 32, 33, 0, 1), heads=2, kv_heads=2, rope=6,
          options={"causal": True}), torch.bfloat16),
    (Case(ATTENTION, "short here, long there", lengths=(40, 3, 17, 16, 9, 0, 2), query_lengths=(3, 40, 16, 17, 0, 9, 5),
          heads=2, kv_heads=1, options={"causal": True, "num_prefix": 1}), torch.float32),
    (Case("gated_cross_attention", "tiny rows", lengths=(33, 3, 32, 16), query_lengths=(2, 33, 32, 0), heads=2,
          kv_heads=2, gate="head", options={"score": "silu", "post_scale": 0.25}), torch.float16),
    (Case("personalized_ffn", "wide", lengths=(3, 0, 40), head_size=80, value_size=130), torch.float32),
    (Case("apply_rotary", "wide", heads=3, head_size=200, rope=120), torch.float16),
]  # fmt: skip


@pytest.mark.parametrize(("case", "dtype"), SIZES, ids=[f"{case.op}-{case.name}" for case, _ in SIZES])
def test_sizes(case: Case, dtype: torch.dtype) -> None:
    rows = testing.compare(case, "triton", dtype, make=guarded_inputs, most_draws=most_draws(2))
    assert not [row for row in rows if not row.ok]


@pytest.mark.parametrize("short", [False, True])
def test_short_rows_share_programs(short: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, rows of at most 16 tokens, and no others, are written by the kernels of short rows, two a program."""
    start, grids = _run.start, []

    def in_part(kernel: Any, grid: int, *arguments: Any, **named: Any) -> None:
        name = kernel.fn.__name__
        if name.endswith("_short"):
            grids.append(grid)
        if name.endswith("_short") == short or name not in ATTENDING:
            start(kernel, grid, *arguments, **named)

    monkeypatch.setattr(_run, "start", in_part)
    lengths = (16, 17, 0, 3, 40, 1, 9)
    case = Case(ATTENTION, "", lengths=lengths, tail=0, heads=2, kv_heads=2)
    for quantity, x in results(ATTENTION, guarded_inputs(case, torch.float32)).items():
        for row, length in zip(x.split(lengths), lengths, strict=True):
            written = not row.isnan().any()
            assert not length or written == ((length <= 16) == short), (quantity, length)
    assert grids == [4 * 2, 4 * 2]


@pytest.mark.parametrize("op", testing.OPS)
def test_tail_and_dtype(op: str) -> None:
    """Outputs and gradients keep shapes and dtypes, and are exactly zero on the tail, whose inputs are NaN."""
    query_lengths = (2, 3, 0, 9, 1) if op in ("jagged_attention", "gated_cross_attention") else None
    epilogue = {} if op == "apply_rotary" else {"residual": True}
    gate = {"gate": "full"} if op in testing.OPS[:3] else {}
    case = Case(op, "", rope=4 if op == "apply_rotary" else 0, query_lengths=query_lengths, **epilogue, **gate)
    inputs = guarded_inputs(case, torch.bfloat16)
    found = results(op, inputs)
    tailed = {"out", "lse", "dx", "dk", "dv", "dq", "dscores", "dweights", "dgate", "dresidual"} - (
        {"out", "lse", "dgate", "dresidual"} if op in ("pma_pooling", "jagged_weighted_sum") else set()
    )
    for name, x in found.items():
        assert x.dtype == (torch.float32 if name == "lse" else torch.bfloat16), name
        if name in tailed:
            tail = x[-case.tail :]
            assert tail.isneginf().all() if name == "lse" else not tail.any(), name
        assert x.isfinite().all() or name == "lse", name


REPEATED = [
    case for case in ALL_CASES if case.name in {"gate and residual", "v is k", "halves", "gelu, bias, residual"}
]


@pytest.mark.parametrize("case", REPEATED, ids=case_ids(REPEATED))
def test_two_runs_give_the_same_bits(case: Case) -> None:
    inputs = guarded_inputs(case, torch.float32)
    runs = [results(case.op, inputs) for _ in range(2)]
    for name in runs[0]:
        assert torch.equal(runs[0][name], runs[1][name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", testing.OPS)
def test_a_row_does_not_see_the_others(op: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of a row, gradients included, are those that it has alone (batch invariance), with split keys or not.

    The gradient of the seeds is a sum over rows and not compared.
    """
    monkeypatch.setattr(splits, "SPLIT_KV", 64)
    lengths = (40, 7, 0, 12, 70, 1)
    extra = {"rope": 6} if op == "apply_rotary" else {}
    inputs = guarded_inputs(Case(op, "", lengths=lengths, tail=0, heads=2, kv_heads=2, **extra), dtype)
    together = results(op, inputs)
    for b in range(len(lengths)):
        for quantity, single in results(op, testing.alone(inputs, lengths, b)).items():
            among_others = testing.row_of(together[quantity], lengths, b)
            assert quantity == "dseeds" or torch.equal(among_others, single), (quantity, b)


@pytest.mark.parametrize("op", ["pma_pooling", "gated_cross_attention"])
@pytest.mark.parametrize(
    ("score", "dtype"), [("softmax", torch.float32), ("softmax", torch.bfloat16), ("silu", torch.float32)], ids=str
)
def test_long_rows_are_split(op: str, score: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of more keys than a split are combined from splits; shorter ones keep the bits that they have without."""
    lengths = (5, 200, 0, 64, 65, 3, 130)
    extra: dict[str, object] = {"skip_prefix": 2} if op == "pma_pooling" else {}
    options = {**extra, "score": score, "post_scale": 1.0 if score == "softmax" else 0.5}
    case = Case(op, "", lengths=lengths, heads=2, kv_heads=2, gate="full", residual=True, options=options)
    inputs = guarded_inputs(case, dtype)
    whole = results(op, inputs)
    monkeypatch.setattr(splits, "SPLIT_KV", 64)
    split = results(op, inputs)
    short = [b for b, length in enumerate(lengths) if length <= 64]
    for quantity in ("out", "dq"):
        if quantity in whole:
            assert torch.equal(split[quantity][short], whole[quantity][short])
            assert not torch.equal(split[quantity], whole[quantity])
    rows = testing.compare(case, "triton", dtype, make=guarded_inputs, most_draws=most_draws(2))
    assert not [row for row in rows if not row.ok]
