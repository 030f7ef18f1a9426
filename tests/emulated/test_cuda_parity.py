"""Every case of every op on the CUDA kernels, within the budget of rounding; each in one dtype by turns.

And in one of two ways by turns: fibers in the order of their threads and copies that land when a thread waits for them,
or fibers in a drawn order and copies that land at once. A missing barrier or wait shows in one of the two. With EVERY=1
each case runs in every dtype and in both ways.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from cuda_calls import SERVED, results
from every import EVERY, most_draws
from grid import ALL_CASES, case_ids, in_turn
from guards import guarded_inputs

from interformer_kernels import testing
from interformer_kernels.testing import Case

WAYS = {"in_order": (0, True), "shuffled": (1, False)}
CASES = [case for case in ALL_CASES if case.op in SERVED]
# Sizes that fill no tile, or several tiles, and sizes without any alignment.
SIZES = [
    Case("personalized_ffn", "wide", lengths=(3, 0, 140), head_size=136, value_size=72, residual=True),
    Case("personalized_ffn", "aligned to 4 bytes", lengths=(33, 31), head_size=34, value_size=6),
    Case("personalized_ffn", "aligned to 8 bytes", lengths=(33, 31), head_size=68, value_size=12),
    Case("personalized_ffn", "split", lengths=(5, 2100, 0, 1025, 1024), head_size=20, value_size=70),
    Case("personalized_ffn", "split, no bias", lengths=(1500, 3), head_size=8, value_size=8, bias=False),
    Case("personalized_ffn", "one number", lengths=(2, 0, 1), head_size=1, value_size=1),
    Case("apply_rotary", "wide", heads=3, head_size=200, rope=120, lengths=(90, 0, 2)),
    Case("apply_rotary", "wide, interleaved", heads=1, head_size=64, rope=32, options={"interleaved": True}),
    Case("apply_rotary", "two channels rotate", head_size=9, rope=2),
]
# Head sizes of every padded width; rows for one, two and four warps in a tile group; many heads of few queries.
ONE = {"heads": 1, "kv_heads": 1}
GROUPED = {"heads": 4, "kv_heads": 2}
SIZES += [
    Case("jagged_attention", "4 and 20", **GROUPED, head_size=4, value_size=20, lengths=(3, 70)),
    Case("jagged_attention", "64 and 72", **ONE, head_size=64, value_size=72, lengths=(9, 0, 90), residual=True),
    Case("jagged_attention", "128", **ONE, head_size=128, value_size=128, lengths=(40, 3), gate="head"),
    Case("jagged_attention", "256 and 4", **ONE, head_size=256, value_size=4, lengths=(20, 33)),
    Case("jagged_attention", "34 and 18", **GROUPED, head_size=34, value_size=18, lengths=(40, 41)),
    Case("jagged_attention", "long, window", **ONE, lengths=(200, 2), options={"window": (40, 3), "num_prefix": 2}),
    Case("pma_pooling", "72", **ONE, head_size=72, lengths=(9, 0, 40), shared_value=True, queries=2),
    Case(
        "pma_pooling", "200, gelu", **ONE, head_size=200, lengths=(40, 9), shared_value=True, options={"score": "gelu"}
    ),
    Case("pma_pooling", "odd group", heads=6, kv_heads=2, queries=2, lengths=(9, 2), shared_value=True),
    Case("pma_pooling", "many heads", heads=16, kv_heads=8, queries=1, head_size=4, lengths=(3, 0, 40)),
    Case("gated_cross_attention", "256", **ONE, head_size=256, value_size=256, queries=5, lengths=(18, 3), gate="full"),
    Case("gated_cross_attention", "many queries", **GROUPED, queries=50, lengths=(18, 0, 70), gate="channel"),
]
# Split rows among rows that are not.
SPLIT = {**ONE, "head_size": 8, "value_size": 12, "lengths": (5, 2100, 0, 1025, 1024), "queries": 2}
SIZES += [
    Case("pma_pooling", "split, gated", **SPLIT, gate="full", residual=True, options={"skip_prefix": 1}),
    Case("pma_pooling", "split, v is k", **SPLIT, shared_value=True),
    Case("gated_cross_attention", "split, silu", **SPLIT, options={"score": "silu", "post_scale": 0.125}),
    Case("gated_cross_attention", "split", **SPLIT, gate="channel"),
    Case("pma_pooling", "row groups", **{**SPLIT, "lengths": (2, 0, 3) * 400}),
]
SIZES = [case for case in SIZES if case.op in SERVED]

each_way = pytest.mark.parametrize("way", WAYS)


TURNS = [
    pytest.param(case, dtype, way, id=f"{name}-{way}")
    for i, (case, dtype, name) in enumerate(in_turn(CASES + SIZES))
    for j, way in enumerate(WAYS)
    if EVERY or (i + j) % len(WAYS) == 0
]


@pytest.mark.parametrize(("case", "dtype", "way"), TURNS)
def test_error_is_within_the_budget(case: Case, dtype: torch.dtype, way: str, emulated: ModuleType) -> None:
    emulated.configure(*WAYS[way])
    rows = testing.compare(case, "cuda", dtype, make=guarded_inputs, most_draws=most_draws(4))
    assert not [row for row in rows if not row.ok]


@each_way
@pytest.mark.parametrize("op", SERVED)
def test_tail_and_dtype(op: str, way: str, emulated: ModuleType) -> None:
    """Outputs and gradients behind the last row are zero; inputs there are not read."""
    emulated.configure(*WAYS[way])
    extra = {"gate": "full", "residual": True} if op in testing.OPS[:3] else {}
    case = Case(op, "", rope=4 if op == "apply_rotary" else 0, **extra)
    of_rows = op in ("pma_pooling", "jagged_weighted_sum") or (
        op == "gated_cross_attention" and case.query_lengths is None
    )
    for name, x in results(op, guarded_inputs(case, torch.bfloat16)).items():
        assert x.dtype == (torch.float32 if name == "lse" else torch.bfloat16), name
        if name in ("dx", "dk", "dv", "dscores", "dweights") or (name == "out" and not of_rows):
            assert not x[-case.tail :].any(), name
        assert x.isfinite().all() or name == "lse", name


def short_inputs(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Numbers of 8 significant bits, which TF32 represents exactly, as it does their products."""
    inputs = testing.make_inputs(case, torch.bfloat16, device, seed)
    return testing.cast_inputs(inputs, dtype)


# Nothing is rounded between two products.
EXACT_IN_TF32 = [
    case
    for case in CASES + SIZES
    if case.op == "personalized_ffn" and case.options.get("activation", "identity") == "identity"
]


@pytest.mark.parametrize("case", EXACT_IN_TF32, ids=case_ids(EXACT_IN_TF32))
def test_tf32_of_short_numbers_is_within_the_budget_of_float32(case: Case, tf32: None) -> None:
    rows = testing.compare(case, "cuda", torch.float32, make=short_inputs, most_draws=most_draws(4))
    assert not [row for row in rows if not row.ok]


def test_tf32_is_used_just_where_it_is_allowed(request: pytest.FixtureRequest) -> None:
    inputs = guarded_inputs(Case("personalized_ffn", "", lengths=(40, 7)), torch.float32)
    exact = results("personalized_ffn", inputs)
    request.getfixturevalue("tf32")
    for name, x in results("personalized_ffn", inputs).items():
        assert torch.equal(x, exact[name]) == (name in ("dbias", "dresidual")), name


# Attention rounds probabilities to TF32 between two products, that is, to as many bits as float16 has.
_ATTENDING = [case for case in CASES + SIZES if case.op in testing.OPS[:3] and not case.rope]
ROUNDED_IN_TF32 = _ATTENDING if EVERY else _ATTENDING[::3]


@pytest.mark.parametrize("case", ROUNDED_IN_TF32, ids=case_ids(ROUNDED_IN_TF32))
def test_tf32_attention_of_short_numbers_is_within_the_budget_of_float16(case: Case, tf32: None) -> None:
    # The gradient of a single gate is one number in each draw: one op draws as many as judging it takes.
    single_gate = case.op == "gated_cross_attention" and case.gate == "scalar"
    few = None if single_gate else most_draws(4)
    rows = testing.compare(case, "cuda", torch.float32, make=short_inputs, most_draws=few)
    budgets = testing.compare(case, "cuda", torch.float16, make=short_inputs, most_draws=few)
    for row, other in zip(rows, budgets, strict=True):
        assert row.error <= other.budget, row.quantity


REPEATED = [case for case in CASES if case.name in {"gate and residual", "v is k", "halves", "gelu, bias, residual"}]


@pytest.mark.parametrize("case", REPEATED, ids=case_ids(REPEATED))
def test_any_order_gives_the_same_bits(case: Case, emulated: ModuleType) -> None:
    inputs = guarded_inputs(case, torch.float32)
    runs = []
    for way in ((0, True), (1, False), (2, True)):
        emulated.configure(*way)
        runs.append(results(case.op, inputs))
    for name, x in runs[0].items():
        assert all(torch.equal(x, run[name]) for run in runs), name


@pytest.mark.parametrize("op", SERVED)
def test_a_row_does_not_see_the_others(op: str) -> None:
    """The bits of a row are those that it has alone (batch invariance)."""
    lengths = (40, 7, 0, 66)
    extra = {"rope": 6} if op == "apply_rotary" else {}
    inputs = guarded_inputs(Case(op, "", lengths=lengths, tail=0, heads=2, kv_heads=2, **extra), torch.float32)
    with torch.no_grad():
        together = testing.call(op, inputs, "cuda")[0]
        dense = together.shape[0] == len(lengths)
        for b, length in enumerate(lengths):
            first = sum(lengths[:b])
            alone = dict(inputs)
            for name, x in inputs.items():
                if name in ("offsets", "kv_offsets"):
                    alone[name] = testing.offsets_of((length,))
                elif name in ("weight", "bias") or (name == "q" and x.dim() == 4):
                    alone[name] = x[b : b + 1]
                elif name in ("q", "k", "v", "x", "scores", "weights"):
                    alone[name] = x[first : first + length]
            single = testing.call(op, alone, "cuda")[0]
            assert torch.equal(together[b : b + 1] if dense else together[first : first + length], single), b


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_a_row_do_not_see_the_others(dtype: torch.dtype) -> None:
    """Alone, a long row has several warps to a block, which share tiles; among short ones each warp is by itself."""
    lengths = (40, 7, 0, 66)
    case = Case("jagged_attention", "", lengths=lengths, tail=0, gate="full", options={"causal": True, "num_prefix": 1})
    inputs = guarded_inputs(case, dtype)
    together = results(case.op, inputs)
    for b, length in enumerate(lengths):
        first = sum(lengths[:b])
        alone = {**inputs, "offsets": testing.offsets_of((length,))}
        for name in ("q", "k", "v", "gate", "grad_out"):
            of_row = inputs[name].detach()[first : first + length]
            alone[name] = of_row.requires_grad_(inputs[name].requires_grad)
        for name, x in results(case.op, alone).items():
            assert torch.equal(together[name][first : first + length], x), (b, name)
